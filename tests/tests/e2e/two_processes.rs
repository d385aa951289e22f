//! Control and data are two processes: either may be killed at any time.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use insula_tests::wait::{holds, until};
use insula_tests::{Service, TestHost, guests, load, proc};
use serde_json::json;

/// Asks on connections of its own until one is answered; says how long that took.
pub(crate) fn answered_after(service: &Service, since: Instant) -> Duration {
    until(
        Duration::from_secs(10),
        "requests are answered again",
        || {
            let patience = Duration::from_secs(5);
            match service.get("/").patience(patience).try_send() {
                Ok(answer) if answer.status == 200 => Ok(since.elapsed()),
                Ok(answer) => panic!("a wrong answer: {} {}", answer.status, answer.text()),
                Err(broken) => Err(format!("{broken:?}")),
            }
        },
    )
}

#[test]
fn a_killed_data_process_is_replaced_and_serves_the_same() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let services: Vec<_> = (0..5)
        .map(|n| {
            let service = tenant.service(&format!("s{n}"));
            service.env("N", &n.to_string()).deploy("hello")
        })
        .collect();
    let preview = services[0].upload(guests::bytes("echo"));
    assert_eq!(preview.status, 201, "{}", preview.text());
    host.admin().put(
        &format!("{}/traffic", services[0].path()),
        &json!({"1": 100}),
    );
    let control = host.pid();
    let mut longest = Duration::ZERO;
    for round in 0..5u64 {
        let before = host.data_pid();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Load while it dies: these connections break, and that is all that they see.
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    if let Ok(answer) = services[1].get("/").try_send() {
                        assert_eq!(answer.status, 200, "{}", answer.text());
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(37 * round));
            host.kill_data();
            let since = Instant::now();
            for service in &services {
                let away = answered_after(service, since);
                longest = longest.max(away);
            }
            ended.store(true, Ordering::Relaxed);
        });
        assert_ne!(host.data_pid(), before, "another process serves");
        assert_eq!(host.pid(), control, "control is the same");
        until(Duration::from_secs(5), "the host is ready", || {
            let ready = host.admin_as(None).request("GET", "/readyz").send();
            holds(ready.status == 200, ready.text())
        });
    }
    eprintln!("killed 5 times under load: answered again within {longest:?}");
    let shown = host.admin().get("/v1/host");
    assert_eq!(shown["data_plane"]["restarts"], 5, "{shown}");
}

#[test]
fn changes_are_acknowledged_while_the_data_process_dies() {
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let first = tenant.deploy("hello");
    let done = AtomicBool::new(false);
    let services = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Any instants will do, as long as they are not always the same of a deploy; and not for
            // ever, since a machine that is busy may take longer to be told than till the next.
            for pause in (0..16).map(|n| 90 + n * 149 % 310) {
                std::thread::sleep(Duration::from_millis(pause));
                if done.load(Ordering::Relaxed) {
                    return;
                }
                host.kill_data();
            }
        });
        let services: Vec<_> = (0..12)
            .map(|n| tenant.service(&format!("s{n}")).deploy("hello"))
            .collect();
        for service in &services[6..] {
            let spec = json!({"usage_header": true});
            host.admin().put(&service.path(), &spec);
        }
        services[0].delete();
        done.store(true, Ordering::Relaxed);
        services
    });
    answered_after(&first, Instant::now());
    assert_eq!(services[0].get("/").send().status, 404, "deleted");
    for (n, service) in services.iter().enumerate().skip(1) {
        let answer = service.get("/").send();
        assert_eq!(answer.status, 200, "{}: {}", service.name(), answer.text());
        let usage = answer.header("insula-usage");
        assert_eq!(usage.is_some(), n >= 6, "{}: {usage:?}", service.name());
    }
}

#[test]
fn what_was_reported_before_a_death_stays_in_the_books() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    for _ in 0..50 {
        assert_eq!(service.get("/").send().status, 200);
    }
    let requests = |host: &TestHost| host.usage("a")["requests"]["ok"].as_u64();
    until(Duration::from_secs(5), "the requests are counted", || {
        let counted = requests(&host);
        holds(counted == Some(50), format!("{counted:?}"))
    });
    host.kill_data();
    answered_after(&service, Instant::now());
    until(
        Duration::from_secs(5),
        "the next one is counted, too",
        || {
            let counted = requests(&host);
            holds(counted >= Some(51), format!("{counted:?}"))
        },
    );
    host.restart();
    assert!(requests(&host) >= Some(51), "{:?}", host.usage("a"));
}

#[test]
fn the_data_process_goes_with_a_control_that_is_killed() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    let data = host.data_pid();
    host.kill();
    until(Duration::from_secs(1), "the data process is gone", || {
        holds(!proc::runs(data), "it runs")
    });
    host.start_again();
    assert_eq!(service.get("/").send().status, 200);
}

#[test]
fn the_data_process_has_artefacts_open_and_nothing_else_of_the_data_directory() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    assert_eq!(service.get("/").send().status, 200);
    let open = std::fs::read_dir(format!("/proc/{}/fd", host.data_pid())).expect("proc(5)");
    let open: Vec<_> = open
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .collect();
    let data = host.data().canonicalize().expect("the data directory");
    let inside = open.iter().filter(|path| path.starts_with(&data));
    let others = |path: &&PathBuf| !path.starts_with(data.join("artefacts"));
    let others: Vec<_> = inside.filter(others).collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(open.len() > 4, "{open:?}");
}

/// A field of a process that lives.
fn status(pid: u32, field: &str) -> String {
    proc::status(pid, field).unwrap_or_else(|| panic!("{field} of {pid}"))
}

/// Whether the host says that a wall around its data process stands.
fn wall_holds(host: &TestHost, name: &str) -> bool {
    let document = host.admin().get("/v1/host");
    let walls = document["data_plane"]["walls"].as_array().expect("a list");
    let wall = walls.iter().find(|wall| wall["name"] == name);
    let wall = wall.unwrap_or_else(|| panic!("no wall {name}: {walls:?}"));
    wall["missing"].is_null()
}

#[test]
fn the_data_process_is_shut_in_as_far_as_the_host_says() {
    let host = TestHost::start();
    let service = host.tenant("a").create().deploy("hello");
    assert_eq!(service.get("/").send().status, 200);
    let data = host.data_pid();
    let holds = |name: &str| wall_holds(&host, name);
    // These need no privilege, and no kernel that we run on lacks them.
    for name in ["closed descriptors", "system calls", "no new privileges"] {
        assert!(holds(name), "{name}");
    }
    assert_eq!(status(data, "Seccomp"), "2");
    assert_eq!(status(data, "NoNewPrivs"), "1");
    let score = std::fs::read_to_string(format!("/proc/{data}/oom_score_adj"));
    assert_eq!(score.expect("proc(5)").trim(), "500");
    if holds("no capabilities but CAP_SYS_NICE") {
        let left = u64::from_str_radix(&status(data, "CapPrm"), 16).expect("a number");
        assert_eq!(left & !(1 << 23), 0, "capabilities(7): {left:x}");
        // Where it can name other processes, not even that.
        assert!(left == 0 || holds("pid namespace"), "{left:x}");
    }
    if holds("pid namespace") {
        let numbers = status(data, "NSpid");
        assert_eq!(numbers.split_whitespace().last(), Some("1"), "{numbers}");
    }
    if holds("own user") {
        let user = status(data, "Uid");
        assert!(user.split_whitespace().all(|id| id != "0"), "{user}");
    }
    if holds("empty root") {
        let root = std::fs::read_dir(format!("/proc/{data}/root/")).expect("proc(5)");
        assert_eq!(root.count(), 0, "something is in its root");
    } else {
        eprintln!("skipped: the empty root, since the kernel refuses it here");
    }
}

/// The scheduling policy of a thread, from `/proc/PID/task/TID/stat` (`proc(5)`, field 41).
fn policy(task: &Path) -> Option<String> {
    let stat = std::fs::read_to_string(task.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(41 - 3).map(ToOwned::to_owned)
}

#[test]
fn what_computes_for_long_gives_way_to_everything_else_on_a_core() {
    let host = TestHost::start();
    if !wall_holds(&host, "runners give way") {
        eprintln!("skipped: the kernel lets no thread's claim be changed here");
        return;
    }
    let service = host.tenant("a").create().deploy("echo");
    let is_runner = |task: &PathBuf| {
        let name = std::fs::read_to_string(task.join("comm"));
        name.is_ok_and(|name| name.starts_with("insula-runner"))
    };
    // One that was starved of a lent core had the claim of any thread for the last piece.
    until(Duration::from_secs(20), "a runner is SCHED_IDLE", || {
        assert_eq!(service.get("/burn?n=5000000").send().status, 200);
        let tasks = std::fs::read_dir(format!("/proc/{}/task", host.data_pid())).expect("proc(5)");
        let runners = tasks.flatten().map(|task| task.path()).filter(is_runner);
        let policies: Vec<_> = runners.filter_map(|task| policy(&task)).collect();
        let gives_way = policies.iter().any(|policy| policy == "5");
        holds(gives_way, format!("policies {policies:?}"))
    });
}

/// A service that has a volume at `/data`.
fn keeper(host: &TestHost) -> Service {
    let tenant = host.tenant("a").create();
    host.admin()
        .put("/v1/tenants/a/volumes/data", &json!({"size": "1MiB"}));
    let spec = json!({"volumes": [{"name": "data", "path": "/data"}]});
    tenant.service("files").spec(spec).deploy("files")
}

#[test]
fn a_volume_is_as_it_was_when_the_data_process_is_replaced() {
    let host = TestHost::start();
    let files = keeper(&host);
    let used = || host.admin().get("/v1/tenants/a/volumes/data")["used_bytes"].as_u64();
    for round in 1..=3u64 {
        let target = format!("/data/{round}");
        let put = files.request("PUT", &target).body("hello");
        assert_eq!(put.send().status, 200);
        host.kill_data();
        until(Duration::from_secs(10), "the file is read again", || {
            let answer = files.get(&target).try_send();
            match answer {
                Ok(answer) => holds(answer.text() == "hello", answer.text()),
                Err(broken) => Err(format!("{broken:?}")),
            }
        });
        // A block and an inode each, counted anew by the one that there is now.
        until(Duration::from_secs(5), "the volume is counted", || {
            let used = used();
            holds(used == Some(round * 5 * 1_024), format!("{used:?}"))
        });
    }
}

#[test]
fn the_data_process_finds_nothing_above_a_volume() {
    let host = TestHost::start();
    let files = keeper(&host);
    assert_eq!(files.request("PUT", "/data/a").body("x").send().status, 200);
    let volumes = std::fs::read_dir(host.data().join("volumes")).expect("a directory");
    let volume = volumes.flatten().next().expect("a volume").path();
    let inode = |path: PathBuf| std::fs::metadata(path).map(|found| found.ino()).ok();
    let is = inode(volume.clone()).expect("it is there");
    let owner = std::fs::metadata(volume.join("a")).expect("written").uid();
    let user = status(host.data_pid(), "Uid");
    let user = user.split_whitespace().next().expect("proc(5)");
    assert_eq!(owner.to_string(), user, "the file is of the data process");
    if !wall_holds(&host, "nothing above volumes") {
        eprintln!("skipped: no mounts can be made here");
        return;
    }
    let open = std::fs::read_dir(format!("/proc/{}/fd", host.data_pid())).expect("proc(5)");
    let open: Vec<_> = open.flatten().map(|entry| entry.path()).collect();
    let mut held = open.iter().filter(|fd| inode((*fd).clone()) == Some(is));
    let held = held.next().expect("it has the volume open");
    assert_eq!(inode(held.join("..")), Some(is), "above it is itself");
    assert_eq!(inode(held.join("../../..")), Some(is), "and above that");
}

#[test]
fn what_the_old_host_still_writes_is_in_the_new_ones_books() {
    let host = TestHost::plan().arg("--drain", "30s").start();
    let files = keeper(&host);
    let volume = || host.admin().get("/v1/tenants/a/volumes/data");
    let used = || volume()["used_bytes"].as_u64();
    let (old, body) = (host.pid(), vec![7; 300_000]);
    let request = files.request("PUT", "/data/late").chunks([body.clone()]);
    let mut connection = files.connect();
    connection.raw(&request.head_bytes()).expect("sent");
    until(
        Duration::from_secs(5),
        "the guest waits for the body",
        || {
            let now = host
                .metrics()
                .sum("insula_instances", &[("state", "running")]);
            holds(now == 1.0, format!("{now}"))
        },
    );
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| host.upgrade());
        until(Duration::from_secs(20), "the new host has counted", || {
            holds(
                host.pid() != old && used() == Some(0),
                format!("{:?}", volume()),
            )
        });
        let mut rest = insula_tests::http::Connection::chunk(&body);
        rest.extend(b"0\r\n\r\n");
        connection.raw(&rest).expect("sent");
        let answer = connection.answer("PUT").expect("an answer of the old host");
        assert_eq!(answer.status, 200, "{}", answer.text());
        upgrade.join().expect("the old host ends");
    });
    until(Duration::from_secs(10), "the file is counted", || {
        let used = used();
        // In blocks, and its inode.
        holds(used == Some(74 * 4_096 + 1_024), format!("{used:?}"))
    });
}

#[test]
fn an_upgrade_in_place_fails_no_request() {
    let rounds: u32 = std::env::var("INSULA_UPGRADES").map_or(2, |n| n.parse().expect("a number"));
    let host = TestHost::plan().arg("--drain", "30s").start();
    let tenant = host.tenant("a").create();
    let hello = tenant.deploy("hello");
    let slow = tenant
        .service("slow")
        .limits(json!({"timeout": "60s"}))
        .deploy("sse");
    let ended = AtomicBool::new(false);
    let more = || !ended.load(Ordering::Relaxed);
    // About 1,000 requests a second. As fast as they are answered would leave no core for the host
    // that takes over: on some kernels, none at all for a minute.
    let paced = || {
        std::thread::sleep(Duration::from_millis(4));
        more()
    };
    let (kept, streams) = std::thread::scope(|scope| {
        let request = hello.get("/");
        let kept = scope.spawn(move || load::as_long_as(paced, 4, &request));
        let request = slow.get("/");
        let streams = scope.spawn(move || load::as_long_as(more, 2, &request));
        for _ in 0..rounds {
            host.upgrade();
            let ready = host.admin_as(None).request("GET", "/readyz").send();
            assert_eq!(ready.status, 200, "{}", ready.text());
        }
        ended.store(true, Ordering::Relaxed);
        (
            kept.join().expect("a client"),
            streams.join().expect("a client"),
        )
    });
    eprintln!(
        "{rounds} upgrades: {} requests on connections that were kept, {} streams, none failed; \
         the slowest request took {:?}",
        kept.total(),
        streams.total(),
        kept.quantile(1.0),
    );
    assert_eq!(
        kept.status(200),
        kept.total(),
        "{:?} {:?}",
        kept.statuses,
        kept.problems
    );
    assert_eq!(
        streams.status(200),
        streams.total(),
        "{:?}",
        streams.statuses
    );
    until(Duration::from_secs(10), "all of it is in the books", || {
        let usage = host.usage("a");
        let counted = usage["requests"]["ok"].as_u64();
        let sent = kept.total() + streams.total();
        holds(counted == Some(sent), format!("{counted:?} of {sent}"))
    });
}
