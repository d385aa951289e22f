/* Makes the disk of one directory fail: preloaded into a host by the tests.
 *
 * FAULT_DIR is the directory whose files fail; a file `fsync` or `full` in FAULT_SWITCH turns a
 * fault on, so that it can come and go while the host runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int on(const char *fault) {
    const char *dir = getenv("FAULT_SWITCH");
    char path[4096];
    if (dir == NULL || snprintf(path, sizeof path, "%s/%s", dir, fault) >= (int)sizeof path)
        return 0;
    int before = errno;
    int found = access(path, F_OK) == 0;
    errno = before;
    return found;
}

static int ours(int fd) {
    const char *dir = getenv("FAULT_DIR");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int before = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (dir == NULL || length < 0)
        return 0;
    path[length] = '\0';
    return strncmp(path, dir, strlen(dir)) == 0;
}

#define FAIL_IF(fd, fault, error)   \
    if (on(fault) && ours(fd)) {    \
        errno = error;              \
        return -1;                  \
    }
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fsync(int fd) {
    FAIL_IF(fd, "fsync", EIO)
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    FAIL_IF(fd, "fsync", EIO)
    return REAL(fdatasync)(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    FAIL_IF(fd, "full", ENOSPC)
    return REAL(write)(fd, bytes, count);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) {
    FAIL_IF(fd, "full", ENOSPC)
    return REAL(pwrite)(fd, bytes, count, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
    FAIL_IF(fd, "full", ENOSPC)
    return REAL(pwrite64)(fd, bytes, count, offset);
}
