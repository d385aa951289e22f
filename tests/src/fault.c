/* Makes the disk of one directory fail, without a change to the program that uses it.
 *
 *   fault PROGRAM ARGUMENT...
 *
 *   this process ── fork ──▶ supervisor ── reads $FAULT_SWITCH/plan, writes $FAULT_SWITCH/status
 *        │ filter, exec           ▲
 *        ▼                        │ asks about every call that the filter names
 *     PROGRAM, its children ──────┘
 *
 * The filter (seccomp_unotify(2), Linux 5.5) stops the calls in the table below until the
 * supervisor has said whether they go on or fail. A call counts when its file lies below
 * $FAULT_DIR. The plan is one line: a serial number, a kind of call, the first and the last call
 * of that kind, counted since the serial number was new, that fail, and the error that they fail
 * with. No plan: nothing fails. The status is one line, too: the serial number, how many calls
 * were counted, how many failed, and the last of those.
 *
 * With "--probe" alone it says by its exit code whether the kernel lets us. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Where a call names its file: a descriptor, or a directory's descriptor and a path. */
enum place { FD, AT, PATH };

static const struct call {
    int number;
    const char *name;
    const char *kind;
    enum place place;
    int first; /* The argument with the descriptor, or the path where there is none. */
} CALLS[] = {
    {SYS_write, "write", "write", FD, 0},
    {SYS_pwrite64, "pwrite64", "write", FD, 0},
    {SYS_ftruncate, "ftruncate", "write", FD, 0},
    {SYS_fallocate, "fallocate", "write", FD, 0},
    {SYS_copy_file_range, "copy_file_range", "write", FD, 2},
    {SYS_fsync, "fsync", "sync", FD, 0},
    {SYS_fdatasync, "fdatasync", "sync", FD, 0},
    {SYS_renameat, "renameat", "name", AT, 0},
    {SYS_renameat2, "renameat2", "name", AT, 0},
    {SYS_unlinkat, "unlinkat", "name", AT, 0},
    {SYS_mkdirat, "mkdirat", "name", AT, 0},
    {SYS_openat, "openat", "open", AT, 0},
    {SYS_openat2, "openat2", "open", AT, 0},
#ifdef SYS_rename
    {SYS_rename, "rename", "name", PATH, 0},
    {SYS_unlink, "unlink", "name", PATH, 0},
    {SYS_mkdir, "mkdir", "name", PATH, 0},
    {SYS_open, "open", "open", PATH, 0},
#endif
};
enum { CALL_COUNT = sizeof CALLS / sizeof *CALLS, PATH_MAX_BYTES = 4096 };

static void fail(const char *what) {
    fprintf(stderr, "fault: %s: %s\n", what, strerror(errno));
    _exit(125);
}

static int install_filter(void) {
    struct sock_filter code[2 * CALL_COUNT + 2];
    size_t length = 0;
    code[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                                  offsetof(struct seccomp_data, nr));
    for (size_t at = 0; at < CALL_COUNT; at++) {
        code[length++] =
            (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CALLS[at].number, 0, 1);
        code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
    }
    code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = length, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -1;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER,
                   &program);
}

/* Whether a path of the process is below our directory; resolves what goes through its own
 * descriptors, and makes `path` the whole. */
static int below(int pid, char *path) {
    static const char SELF[] = "/proc/self/fd/";
    const char *directory = getenv("FAULT_DIR");
    if (strncmp(path, SELF, sizeof SELF - 1) == 0) {
        char link[64], rest[PATH_MAX_BYTES];
        char *end;
        long fd = strtol(path + sizeof SELF - 1, &end, 10);
        snprintf(rest, sizeof rest, "%s", end);
        snprintf(link, sizeof link, "/proc/%d/fd/%ld", pid, fd);
        ssize_t length = readlink(link, path, PATH_MAX_BYTES - 1);
        if (length < 0)
            return 0;
        snprintf(path + length, PATH_MAX_BYTES - length, "%s", rest);
    }
    return directory != NULL && strncmp(path, directory, strlen(directory)) == 0;
}

static int path_of_fd(int pid, int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/%d/fd/%d", pid, fd);
    ssize_t length = readlink(link, path, PATH_MAX_BYTES - 1);
    path[length < 0 ? 0 : length] = '\0';
    return length >= 0;
}

/* A path from the memory of the process: up to the end of a page, again where it goes on. */
static int path_from_memory(int pid, unsigned long long address, char *path) {
    size_t taken = 0;
    while (taken < PATH_MAX_BYTES - 1) {
        size_t piece = 4096 - (address + taken) % 4096;
        if (piece > PATH_MAX_BYTES - 1 - taken)
            piece = PATH_MAX_BYTES - 1 - taken;
        struct iovec here = {path + taken, piece};
        struct iovec there = {(void *)(address + taken), piece};
        ssize_t got = process_vm_readv(pid, &here, 1, &there, 1, 0);
        if (got <= 0)
            return 0;
        if (memchr(path + taken, '\0', got) != NULL)
            return 1;
        taken += got;
    }
    return 0;
}

/* Finds the file of a call; says whether it is ours. */
static int ours(const struct seccomp_notif *asked, const struct call *call, char *path) {
    const unsigned long long *arguments = asked->data.args;
    int pid = asked->pid;
    if (call->place == FD)
        return path_of_fd(pid, arguments[call->first], path) && below(pid, path);
    if (call->place == PATH)
        return path_from_memory(pid, arguments[call->first], path) && below(pid, path);
    char name[PATH_MAX_BYTES];
    if (!path_from_memory(pid, arguments[call->first + 1], name))
        return 0;
    if (name[0] == '/') {
        memcpy(path, name, strlen(name) + 1);
        return below(pid, path);
    }
    if ((int)arguments[call->first] == AT_FDCWD ||
        !path_of_fd(pid, arguments[call->first], path))
        return 0;
    size_t length = strlen(path), more = strlen(name);
    if (length + 1 + more >= PATH_MAX_BYTES)
        return 0;
    path[length] = '/';
    memcpy(path + length + 1, name, more + 1);
    return below(pid, path);
}

static struct {
    unsigned long long serial, counted, failed;
    char last[PATH_MAX_BYTES + 64];
} seen;

static void in_switch(const char *name, char *path, size_t size) {
    const char *directory = getenv("FAULT_SWITCH");
    snprintf(path, size, "%s/%s", directory == NULL ? "" : directory, name);
}

static void tell(void) {
    char path[PATH_MAX_BYTES], text[PATH_MAX_BYTES + 128];
    in_switch("status", path, sizeof path);
    int length = snprintf(text, sizeof text, "%llu %llu %llu %s\n", seen.serial, seen.counted,
                          seen.failed, seen.last);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, text, length) != length)
        _exit(124);
    close(fd);
}

/* The error of a call that counts; 0 where it goes on. */
static int verdict(const struct call *call, const char *path) {
    char file[PATH_MAX_BYTES], kind[16];
    unsigned long long serial, first, last;
    int error;
    in_switch("plan", file, sizeof file);
    FILE *plan = fopen(file, "re");
    if (plan == NULL)
        return 0;
    int read = fscanf(plan, "%llu %15s %llu %llu %d", &serial, kind, &first, &last, &error);
    fclose(plan);
    if (read != 5 || strcmp(kind, call->kind) != 0)
        return 0;
    if (serial != seen.serial) {
        memset(&seen, 0, sizeof seen);
        seen.serial = serial;
    }
    seen.counted++;
    int fails = seen.counted >= first && seen.counted <= last;
    if (fails) {
        seen.failed++;
        snprintf(seen.last, sizeof seen.last, "%s %s", call->name, path);
    }
    tell();
    return fails ? error : 0;
}

static void supervise(int listener) {
    union {
        struct seccomp_notif asked;
        char room[512];
    } in;
    union {
        struct seccomp_notif_resp answer;
        char room[512];
    } out;
    for (;;) {
        struct pollfd ready = {.fd = listener, .events = POLLIN};
        if (poll(&ready, 1, -1) < 0 && errno != EINTR)
            _exit(123);
        if (!(ready.revents & POLLIN)) {
            if (ready.revents)
                _exit(0); /* All that the filter is for have ended. */
            continue;
        }
        memset(&in, 0, sizeof in);
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &in.asked) != 0)
            continue; /* It was killed meanwhile. */
        const struct call *call = NULL;
        for (size_t at = 0; at < CALL_COUNT; at++)
            if (CALLS[at].number == in.asked.data.nr)
                call = &CALLS[at];
        char path[PATH_MAX_BYTES] = "";
        int error = 0;
        if (call != NULL && ours(&in.asked, call, path))
            error = verdict(call, path);
        memset(&out, 0, sizeof out);
        out.answer.id = in.asked.id;
        out.answer.error = -error;
        out.answer.flags = error == 0 ? SECCOMP_USER_NOTIF_FLAG_CONTINUE : 0;
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &out.answer);
    }
}

static void send_fd(int socket, int fd) {
    char byte = 0, room[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec bytes = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *control = CMSG_FIRSTHDR(&message);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(control), &fd, sizeof fd);
    if (sendmsg(socket, &message, 0) != 1)
        fail("sendmsg");
}

static int receive_fd(int socket) {
    int fd;
    char byte, room[CMSG_SPACE(sizeof fd)];
    struct iovec bytes = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1)
        _exit(0); /* There was no filter. */
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

int main(int count, char **arguments) {
    if (count == 2 && strcmp(arguments[1], "--probe") == 0) {
        if (install_filter() < 0) {
            perror("seccomp");
            return 1;
        }
        return 0;
    }
    int sockets[2];
    if (count < 2 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0)
        fail("socketpair");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        close(sockets[0]);
        /* What the host says ends with the host. */
        int null = open("/dev/null", O_RDWR);
        for (int fd = 0; fd < 3; fd++)
            dup2(null, fd);
        supervise(receive_fd(sockets[1]));
    }
    /* Where Yama keeps one process from another's memory. */
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    int listener = install_filter();
    if (listener < 0)
        fail("seccomp");
    send_fd(sockets[0], listener);
    close(listener);
    execv(arguments[1], arguments + 1);
    fail(arguments[1]);
}
