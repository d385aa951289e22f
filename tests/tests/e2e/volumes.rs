//! Volumes: what guests keep, how much of it, and what they cannot reach.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use insula_tests::wait::holds;
use insula_tests::{Service, TestHost};
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;

/// A tenant with a volume, and a service that mounts it at `/data`.
fn keeper(host: &TestHost, tenant: &str, volume: &Value, mode: &str) -> Service {
    let owner = host.tenant(tenant).create();
    let path = format!("/v1/tenants/{tenant}/volumes/data");
    host.admin().put(&path, volume);
    let mounts = json!([{"name": "data", "path": "/data", "mode": mode}]);
    let spec = json!({"volumes": mounts, "limits": {"fuel": "100G", "timeout": "60s"}});
    owner.service("files").spec(spec).deploy("files")
}

fn used(host: &TestHost, volume: &str) -> (u64, u64) {
    let volume = host.admin().get(&format!("/v1/tenants/a/volumes/{volume}"));
    let number = |field: &str| volume[field].as_u64().unwrap_or_else(|| panic!("{volume}"));
    (number("used_bytes"), number("used_inodes"))
}

/// The answer, or the error that the guest saw.
fn post(files: &Service, target: &str) -> Result<String, String> {
    send(files, "POST", target, Vec::new())
}

fn send(files: &Service, method: &str, target: &str, body: Vec<u8>) -> Result<String, String> {
    let request = files.request(method, target).body(body);
    let answer = request.send();
    match answer.status {
        200 => Ok(answer.text()),
        409 => Err(answer.text().trim().to_owned()),
        status => panic!("{method} {target}: {status} {}", answer.text()),
    }
}

/// `EIO` of WASI: what wasi-libc says of any stream that failed.
fn is_cut_off(result: &Result<String, String>) -> bool {
    result.as_ref().is_err_and(|error| error.ends_with(" 29"))
}

/// `EDQUOT` of WASI.
fn is_over_quota(result: &Result<String, String>) -> bool {
    result.as_ref().is_err_and(|error| error.ends_with(" 19"))
}

#[test]
fn what_one_request_writes_the_next_one_reads_and_a_restart_keeps_it() {
    let host = TestHost::start();
    let files = keeper(&host, "a", &json!({"size": "1MiB"}), "rw");
    send(&files, "PUT", "/data/a.txt", b"hello".to_vec()).expect("written");
    assert_eq!(
        send(&files, "GET", "/data/a.txt", Vec::new()).as_deref(),
        Ok("hello")
    );
    assert_eq!(used(&host, "data"), (5 * KIB, 1));
    host.crash_and_restart();
    assert_eq!(
        send(&files, "GET", "/data/a.txt", Vec::new()).as_deref(),
        Ok("hello")
    );
    assert_eq!(used(&host, "data"), (5 * KIB, 1));
    let metrics = host.metrics();
    assert_eq!(
        metrics.count("insula_storage_bytes", &[("tenant", "a")]),
        5 * KIB
    );
    // What is mounted stays, and what is not there is not mounted.
    let admin = host.admin();
    let refused = admin.request("DELETE", "/v1/tenants/a/volumes/data").send();
    assert_eq!(
        (refused.status, refused.problem()),
        (409, "volume_in_use".to_owned())
    );
    let spec = json!({"volumes": [{"name": "nothing", "path": "/n"}]});
    let refused = admin
        .json("PUT", "/v1/tenants/a/services/other", &spec)
        .send();
    assert_eq!(
        (refused.status, refused.problem()),
        (422, "unknown_volume".to_owned())
    );
    files.delete();
    admin.delete("/v1/tenants/a/volumes/data");
    let left = fs::read_dir(host.data().join("volumes"))
        .expect("a directory")
        .count();
    assert_eq!(left, 0);
}

#[test]
fn a_quota_holds_in_bytes_and_in_inodes() {
    let host = TestHost::start();
    let files = keeper(&host, "a", &json!({"size": "256KiB", "inodes": 8}), "rw");
    for target in [
        "/data/a?do=size&n=4611686018427387904",
        "/data/a?do=size&n=300000",
    ] {
        let refused = post(&files, target);
        assert!(is_over_quota(&refused), "{target}: {refused:?}");
    }
    let refused = post(&files, "/data/a?do=unlinked&n=300000");
    assert!(is_cut_off(&refused), "{refused:?}");
    let said = post(&files, "/data/s?do=stream&n=300000").expect("an answer");
    assert!(said.contains("Quota") || said.contains("quota"), "{said}");
    post(&files, "/data/s?do=rm").expect("removed");
    let refused = send(
        &files,
        "POST",
        "/data/a?do=write&at=1000000000000",
        b"x".to_vec(),
    );
    assert!(is_cut_off(&refused), "{refused:?}");
    let refused = send(&files, "PUT", "/data/a", vec![1; 300_000]);
    assert!(is_cut_off(&refused), "{refused:?}");
    assert!(used(&host, "data").0 <= 256 * KIB);
    post(&files, "/data/a?do=rm").expect("removed");
    assert_eq!(used(&host, "data"), (0, 0));
    assert_eq!(
        post(&files, "/data/u?do=unlinked&n=200000").as_deref(),
        Ok("200000\n")
    );
    assert_eq!(used(&host, "data"), (0, 0), "it is closed");
    // What goes makes room, again and again.
    for round in 0..5 {
        send(&files, "PUT", "/data/a", vec![1; 200_000]).expect("room");
        send(&files, "PUT", "/data/b", vec![2; 20_000]).expect("room");
        post(&files, "/data/b?do=mv&to=/data/a").expect("renamed");
        assert_eq!(used(&host, "data"), (21 * KIB, 1), "round {round}");
        post(&files, "/data/a?do=size&n=0").expect("cut");
        assert_eq!(used(&host, "data"), (KIB, 1));
    }
    post(&files, "/data/d?do=mkdir").expect("made");
    let filled = post(&files, "/data/d?do=fill&n=100").expect("an answer");
    assert!(filled.starts_with("6 "), "{filled}");
    assert!(is_over_quota(&post(&files, "/data/e?do=mkdir")));
    assert_eq!(used(&host, "data").1, 8);
    let before = used(&host, "data");
    host.crash_and_restart();
    assert_eq!(used(&host, "data"), before, "counted anew");
    let spec = json!({"size": "1MiB", "inodes": 100});
    host.admin().put("/v1/tenants/a/volumes/data", &spec);
    post(&files, "/data/e?do=mkdir").expect("there is room now");
}

#[test]
fn a_tenants_limit_is_over_all_its_volumes() {
    let host = TestHost::start();
    let files = keeper(&host, "a", &json!({"size": "1MiB"}), "rw");
    let admin = host.admin();
    admin.put("/v1/tenants/a", &json!({"storage": {"limit": "100KiB"}}));
    let refused = send(&files, "PUT", "/data/a", vec![1; 150_000]);
    assert!(is_cut_off(&refused), "{refused:?}");
    post(&files, "/data/a?do=rm").expect("removed");
    send(&files, "PUT", "/data/a", vec![1; 60_000]).expect("room");
    // A copy would be beyond it.
    let copy = json!({"name": "copy"});
    let refused = admin
        .json("POST", "/v1/tenants/a/volumes/data/clone", &copy)
        .send();
    assert_eq!(
        (refused.status, refused.problem()),
        (409, "storage_full".to_owned())
    );
    let metrics = host.metrics();
    assert_eq!(
        metrics.count("insula_storage_limit_bytes", &[("tenant", "a")]),
        100 * KIB
    );
    assert_eq!(
        metrics.count("insula_storage_bytes", &[("tenant", "a")]),
        61 * KIB
    );
}

#[test]
fn nothing_beside_the_volume_is_reached() {
    let host = TestHost::start();
    let files = keeper(&host, "a", &json!({}), "rw");
    let other = keeper(&host, "b", &json!({}), "rw");
    send(&other, "PUT", "/data/secret", b"of b".to_vec()).expect("written");
    post(&files, "/data/d?do=mkdir").expect("made");
    send(&files, "PUT", "/data/d/inside", b"inside".to_vec()).expect("written");
    let volumes = host.data().join("volumes");
    let roots: Vec<_> = fs::read_dir(&volumes)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    let root = roots
        .iter()
        .find(|root| root.join("d").exists())
        .expect("a's");
    let neighbour = roots
        .iter()
        .find(|root| root.join("secret").exists())
        .expect("b's");
    // What a guest cannot make is put there by hand.
    let name = neighbour.file_name().expect("a name").to_string_lossy();
    for (link, target) in [
        ("abs", "/etc/passwd".to_owned()),
        ("root", "/".to_owned()),
        ("up", "..".to_owned()),
        ("beside", format!("../{name}/secret")),
        ("twice", format!("d/../../{name}/secret")),
        ("proc", "/proc/self/environ".to_owned()),
        ("self", "self".to_owned()),
        ("slash", "/etc/".to_owned()),
    ] {
        std::os::unix::fs::symlink(target, root.join(link)).expect("a link");
    }
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), kind, mode, 0).expect("a pipe");
    let long = format!("/data/{}", "n".repeat(256));
    let longer = format!("/data/{}x", "d/../".repeat(900));
    for path in [
        "/etc/passwd",
        "/data/../etc/passwd",
        "/data/..",
        "/data/d/../../x",
        "/data/abs",
        "/data/root/etc/passwd",
        "/data/up/lock",
        "/data/up",
        "/data/beside",
        "/data/twice",
        "/data/proc",
        "/data/self",
        "/data/slash/passwd",
        "/data/fifo",
        "/proc/self/environ",
        "/data/d/inside/",
        "/data/d/inside/x",
        "/data/nothing",
        "data/../../x",
        "",
        &long,
        &longer,
    ] {
        let escaped: String = path.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for (method, what) in [("GET", ""), ("PUT", ""), ("POST", "&do=append")] {
            if method != "GET" && path == "/data/nothing" {
                continue;
            }
            let target = format!("/x?path={escaped}{what}");
            let refused = send(&files, method, &target, b"x".to_vec());
            assert!(refused.is_err(), "{method} {path}: {refused:?}");
        }
    }
    for target in [
        "/data/d/inside?do=mv&to=/data/up/x",
        "/data/d/inside?do=mv&to=/data/../x",
        "/data/beside?do=size&n=0",
        "/data/up?do=list",
        "/data/root?do=list",
        "/data/up/x?do=mkdir",
        "/data/up/lock?do=rm",
        "/data/d/inside?do=link&to=/data/hard",
        "/data/new?do=symlink&to=/etc/passwd",
    ] {
        let refused = post(&files, target);
        assert!(refused.is_err(), "{target}: {refused:?}");
    }
    // What leads to somewhere inside is followed.
    assert_eq!(
        send(&files, "GET", "/data/d/../d/inside", Vec::new()).as_deref(),
        Ok("inside")
    );
    post(&files, "/data/good?do=symlink&to=d/inside").expect("made");
    assert_eq!(
        send(&files, "GET", "/data/good", Vec::new()).as_deref(),
        Ok("inside")
    );
    a_link_that_comes_and_goes_leads_nowhere(&files, root, neighbour);
    assert_eq!(fs::read(neighbour.join("secret")).expect("b's"), b"of b");
    assert_eq!(
        send(&other, "GET", "/data/secret", Vec::new()).as_deref(),
        Ok("of b")
    );
}

/// A directory is exchanged with a link to another tenant's, over and over, while a guest opens a
/// path through it.
fn a_link_that_comes_and_goes_leads_nowhere(files: &Service, root: &Path, neighbour: &Path) {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let (swapped, link) = (root.join("swapped"), root.join("link"));
    fs::create_dir(&swapped).expect("a directory");
    fs::write(swapped.join("secret"), "of a").expect("a file");
    std::os::unix::fs::symlink(neighbour, &link).expect("a link");
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::SeqCst) {
                renameat_with(CWD, &swapped, CWD, &link, RenameFlags::EXCHANGE).expect("exchanged");
            }
        });
        let mut own = 0;
        for _ in 0..300 {
            match send(files, "GET", "/data/swapped/secret", Vec::new()) {
                Ok(text) if text == "of a" => own += 1,
                Ok(text) => panic!("reached {text:?}"),
                Err(_) => {}
            }
        }
        ends.store(true, Ordering::SeqCst);
        assert!(own > 0, "the path was never open");
    });
}

#[test]
fn what_is_mounted_to_be_read_is_not_written() {
    let host = TestHost::start();
    let files = keeper(&host, "a", &json!({}), "rw");
    send(&files, "PUT", "/data/a", b"kept".to_vec()).expect("written");
    let mounts = json!([{"name": "data", "path": "/data", "mode": "ro"}]);
    let path = "/v1/tenants/a/services/files";
    host.admin().put(path, &json!({"volumes": mounts}));
    assert_eq!(
        send(&files, "GET", "/data/a", Vec::new()).as_deref(),
        Ok("kept")
    );
    assert_eq!(post(&files, "/data?do=list").as_deref(), Ok("a\n"));
    for target in [
        "/data/a?do=size&n=0",
        "/data/a?do=append",
        "/data/a?do=write&at=0",
        "/data/a?do=rm",
        "/data/a?do=mv&to=/data/b",
        "/data/a?do=link&to=/data/b",
        "/data/b?do=symlink&to=a",
        "/data/b?do=mkdir",
        "/data/b?do=append",
    ] {
        let refused = send(&files, "POST", target, b"x".to_vec());
        assert!(refused.is_err(), "{target}: {refused:?}");
    }
    assert!(send(&files, "PUT", "/data/a", b"x".to_vec()).is_err());
    assert_eq!(
        send(&files, "GET", "/data/a", Vec::new()).as_deref(),
        Ok("kept")
    );
}

#[test]
fn a_snapshot_stays_as_it_was_and_a_clone_goes_its_own_way() {
    let host = TestHost::start();
    let files = keeper(&host, "a", &json!({"size": "1MiB"}), "rw");
    post(&files, "/data/d?do=mkdir").expect("made");
    send(&files, "PUT", "/data/d/a", b"before".to_vec()).expect("written");
    let admin = host.admin();
    let snapshot = admin.post(
        "/v1/tenants/a/volumes/data/snapshot",
        &json!({"name": "then"}),
    );
    assert_eq!(snapshot["read_only"], true);
    assert_eq!(snapshot["origin"], "data");
    admin.post("/v1/tenants/a/volumes/data/clone", &json!({"name": "copy"}));
    send(&files, "PUT", "/data/d/a", b"after".to_vec()).expect("written");
    let path = "/v1/tenants/a/services/files";
    let refused = json!({"volumes": [{"name": "then", "path": "/then"}]});
    let refused = admin.json("PUT", path, &refused).send();
    assert_eq!(
        (refused.status, refused.problem()),
        (422, "volume_read_only".to_owned())
    );
    let mounts = json!([
        {"name": "data", "path": "/data"},
        {"name": "then", "path": "/then", "mode": "ro"},
        {"name": "copy", "path": "/copy"},
    ]);
    admin.put(path, &json!({"volumes": mounts}));
    let read = |path: &str| send(&files, "GET", path, Vec::new());
    assert_eq!(read("/data/d/a").as_deref(), Ok("after"));
    assert_eq!(read("/then/d/a").as_deref(), Ok("before"));
    send(&files, "PUT", "/copy/d/a", b"own".to_vec()).expect("written");
    assert_eq!(read("/copy/d/a").as_deref(), Ok("own"));
    assert_eq!(read("/data/d/a").as_deref(), Ok("after"));
    assert!(send(&files, "PUT", "/then/d/a", b"x".to_vec()).is_err());
    // One volume's file is not moved to another's.
    assert!(post(&files, "/data/d/a?do=mv&to=/copy/x").is_err());
    let metrics = host.metrics_when("all three are counted", |metrics| {
        let bytes = metrics.count("insula_storage_bytes", &[("tenant", "a")]);
        holds(bytes == 3 * 10 * KIB, format!("{bytes}"))
    });
    drop(metrics);
    let again = json!({"name": "then"});
    let path = "/v1/tenants/a/volumes/data/snapshot";
    let again = admin.json("POST", path, &again).send();
    assert_eq!(again.status, 412, "{}", again.text());
}
