//! A control volume without room: a small file system of the host's own, in a mount namespace that
//! goes with the process.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use insula_tests::tools::{self, skipped};
use insula_tests::{TestHost, guests};
use rustix::process::getuid;
use serde_json::json;
use tempfile::TempDir;

const SIZE: &str = "24m";

/// Becomes a program that has a small file system at `$INSULA_SMALL`.
fn script(place: &Path) -> PathBuf {
    let root = if getuid().is_root() {
        ""
    } else {
        "--map-root-user"
    };
    let text = format!(
        "#!/bin/sh\nexec unshare --mount {root} -- /bin/sh -c \
         'mount -t tmpfs -o size={SIZE},mode=700 small \"$SMALL\" && exec \"$@\"' sh \"$@\"\n"
    );
    let path = place.join("small.sh");
    tools::executable(&path, text);
    path
}

/// The host, and its volume as this process sees it.
fn start(place: &Path) -> Option<(TestHost, PathBuf)> {
    let (script, volume) = (script(place), place.join("volume"));
    fs::create_dir(&volume).expect("a directory");
    let probed = Command::new(&script)
        .arg("true")
        .env("SMALL", &volume)
        .output();
    let probed = probed.expect("a shell");
    if !probed.status.success() {
        let why = String::from_utf8_lossy(&probed.stderr).into_owned();
        skipped(&format!(
            "no file system of one's own can be mounted: {why}"
        ));
        return None;
    }
    let host = TestHost::plan()
        .through(script)
        .env("SMALL", &volume)
        .data(&volume)
        .start();
    let seen = PathBuf::from(format!("/proc/{}/root{}", host.pid(), volume.display()));
    // The host has opened its directory; from now on the harness finds its files here.
    fs::remove_file(host.data()).expect("a link");
    symlink(&seen, host.data()).expect("a link");
    Some((host, seen))
}

/// Writes until there is no room at all.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("a file");
    for piece in [1 << 20, 4_096, 1] {
        let bytes = vec![1; piece];
        while file.write_all(&bytes).is_ok() {}
    }
}

#[test]
fn a_full_control_volume_stops_changes_until_there_is_room() {
    let place = TempDir::with_prefix("insula-test-").expect("a directory");
    let Some((host, volume)) = start(place.path()) else {
        return;
    };
    let service = host.tenant("a").create().deploy("hello");
    let admin = host.admin();
    let change = |n: u64| {
        let spec = json!({"env": {"N": n.to_string()}});
        admin.json("PUT", &service.path(), &spec).send()
    };
    let filler = volume.join("filler");
    fill(&filler);
    let upload = service.upload(guests::bytes("echo"));
    let told = (upload.status, upload.problem());
    assert_eq!(told, (507, "no_space".to_owned()), "{upload:?}");
    // Small changes find room in the database's own files for a while.
    let mut acknowledged = 0;
    let refused = (1..5_000).find_map(|n| {
        let answer = change(n);
        if answer.status == 200 {
            acknowledged = n;
            return None;
        }
        Some((answer.status, answer.problem()))
    });
    assert_eq!(refused, Some((507, "no_space".to_owned())));
    for _ in 0..50 {
        assert_eq!(service.get("/").send().status, 200, "serving goes on");
    }
    let now = admin.get(&service.path());
    if acknowledged > 0 {
        assert_eq!(now["env"]["N"], acknowledged.to_string());
    }
    let metrics = admin.request("GET", "/metrics").send().text();
    assert!(metrics.contains("\ninsula_state_stopped 0\n"), "{metrics}");

    fs::remove_file(filler).expect("a file");
    assert_eq!(change(9_999).status, 200, "it heals by itself");
    assert_eq!(service.upload(guests::bytes("echo")).status, 201);
    let now = admin.get(&service.path());
    assert_eq!(
        (&now["env"]["N"], &now["active_version"]),
        (&json!("9999"), &json!(2))
    );
    let ready = host.admin_as(None).request("GET", "/readyz").send();
    assert_eq!(ready.status, 200);
    assert!(host.files("tmp").is_empty(), "nothing half is left");
    let said = host.said();
    assert!(!said.contains("panicked"), "{said}");
}
