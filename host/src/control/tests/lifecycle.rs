//! Deploys that fail, restarts, refusals, shutdown.

use std::io::Write;
use std::sync::atomic::Ordering;

use insula_types::{Outcome, ServiceId, TenantId};
use serde_json::json;

use super::rig::{Answer, Rig, eventually};
use crate::messages::UsageDelta;

const WEB: &str = "/v1/tenants/acme/services/web";
const VERSIONS: &str = "/v1/tenants/acme/services/web/versions";

#[test]
fn a_component_that_does_not_compile_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let bad = rig.upload("bad");
    bad.refused(422, "wrong_world");
    assert_eq!(bad.json()["detail"], "no handler");
    rig.upload("crash").refused(422, "compile_limit");
    rig.upload("slow").refused(422, "compile_limit");
    let broken = rig.upload("broken");
    broken.refused(500, "compile_failed");
    assert!(
        !broken.body.contains("secret"),
        "the child's own words stay in the log"
    );
    rig.send("POST", VERSIONS, &["content-type: text/plain"], b"x")
        .refused(415, "unsupported_media_type");
    let gzip = ["content-type: application/wasm", "content-encoding: gzip"];
    rig.send("POST", VERSIONS, &gzip, b"x")
        .refused(415, "unsupported_media_type");
    let long = ["content-type: application/wasm", "expect: 100-continue"];
    let mut stream = rig.connect();
    write!(
        stream,
        "POST {VERSIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n{}\r\n\
         connection: close\r\ncontent-length: 67108865\r\n\r\n",
        rig.token,
        long.join("\r\n")
    )
    .unwrap();
    Answer::read(stream).refused(413, "too_large");
    assert_eq!(rig.get(VERSIONS).json()["items"], json!([]));
    eventually("no file is left", || {
        rig.files("blobs") + rig.files("artefacts") + rig.files("tmp") == 0
    });
    rig.upload("good").expect(201);
}

#[test]
fn an_upload_that_breaks_off_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let mut stream = rig.connect();
    write!(
        stream,
        "POST {VERSIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-type: application/wasm\r\ncontent-length: 1000\r\n\r\nhalf",
        rig.token
    )
    .unwrap();
    eventually("the upload begins", || rig.files("tmp") == 1);
    drop(stream);
    eventually("the file goes", || rig.files("tmp") == 0);
    assert_eq!(rig.get(VERSIONS).json()["items"], json!([]));
}

#[test]
fn endless_uploads_are_cut_at_the_cap() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let mut stream = rig.connect();
    write!(
        stream,
        "POST {VERSIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         connection: close\r\ncontent-type: application/wasm\r\ntransfer-encoding: chunked\r\n\r\n",
        rig.token
    )
    .unwrap();
    let mut chunk = b"100000\r\n".to_vec();
    chunk.extend(vec![b'x'; 1 << 20]);
    chunk.extend(b"\r\n");
    let reader = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let mut written = 0;
        while stream.write_all(&chunk).is_ok() && written < 200 {
            written += 1;
        }
        written
    });
    Answer::read(reader).refused(413, "too_large");
    assert!(writer.join().unwrap() < 200, "the host stopped reading");
    eventually("the file goes", || rig.files("tmp") == 0);
}

#[test]
fn uploads_of_one_tenant_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let uploads: Vec<_> = (0..6).map(|_| scope.spawn(|| rig.upload("slow"))).collect();
        rig.raw("GET", "/healthz", &[], b"").expect(200);
        uploads
            .into_iter()
            .map(|upload| upload.join().unwrap())
            .collect()
    });
    let busy: Vec<_> = answers
        .iter()
        .filter(|answer| answer.status == 429)
        .collect();
    assert_eq!(busy.len(), 2, "{answers:?}");
    busy[0].refused(429, "tenant_busy");
    assert!(busy[0].headers.contains_key("retry-after"));
}

#[test]
fn a_restart_serves_the_same_without_compiling() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.upload("one").expect(201);
    let again = rig.upload("one").expect(201).json();
    assert_eq!(
        (&again["version"], &again["compile_ms"]),
        (&json!(2), &json!(0))
    );
    assert_eq!(
        rig.compiled.load(Ordering::SeqCst),
        1,
        "the same bytes are compiled once"
    );
    assert_eq!((rig.files("blobs"), rig.files("artefacts")), (1, 1));
    let before = rig.get(WEB).json();
    rig.fake.usage.lock().unwrap().push(UsageDelta {
        tenant: TenantId::new(1),
        service: ServiceId::new(1),
        requests: [1; Outcome::ALL.len()],
        fuel: 5,
        cpu_ns: 1,
        memory_byte_ms: 1,
        bytes_in: 1,
        bytes_out: 1,
    });
    let token = rig.token.clone();
    let fake = rig.stop();
    assert_eq!(fake.seen.lock().unwrap().last().unwrap(), "drain 10ms");

    let rig = Rig::start(dir.path());
    assert_eq!(rig.token, token, "no new token");
    assert_eq!(rig.get(WEB).json(), before);
    assert_eq!(
        rig.seen(),
        ["tenant acme", "service web v2 sealed:compiled:one", "open"]
    );
    assert_eq!(rig.compiled.load(Ordering::SeqCst), 0);
    rig.raw("GET", "/readyz", &[], b"").expect(200);
    let usage = rig.get("/v1/tenants/acme/usage").json();
    assert_eq!(usage["fuel"], 5, "collected and stored at the shutdown");
    rig.delete(WEB).expect(204);
    assert_eq!((rig.files("blobs"), rig.files("artefacts")), (0, 0));
}

#[test]
fn a_missing_artefact_is_compiled_again_in_the_background() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.upload("one").expect(201);
    rig.stop();
    for artefact in std::fs::read_dir(dir.path().join("artefacts")).unwrap() {
        std::fs::remove_file(artefact.unwrap().path()).unwrap();
    }
    let rig = Rig::start(dir.path());
    eventually("readiness", || {
        rig.raw("GET", "/readyz", &[], b"").status == 200
    });
    assert_eq!(
        rig.seen(),
        [
            "tenant acme",
            "service web dark",
            "open",
            "service web v1 sealed:compiled:one"
        ]
    );
    assert_eq!(rig.compiled.load(Ordering::SeqCst), 1);
}

#[test]
fn all_versions_are_compiled_again_each_component_once() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    let twin = "/v1/tenants/acme/services/twin";
    rig.put(twin, "{}").expect(201);
    let head = &["content-type: application/wasm"];
    let upload = |path: &str, component: &str| {
        let sent = rig.send("POST", path, head, component.as_bytes());
        sent.expect(201);
    };
    upload(&format!("{twin}/versions"), "one");
    upload(VERSIONS, "one");
    upload(&format!("{VERSIONS}?activate=false"), "two");
    rig.stop();
    for artefact in std::fs::read_dir(dir.path().join("artefacts")).unwrap() {
        std::fs::remove_file(artefact.unwrap().path()).unwrap();
    }
    let rig = Rig::start(dir.path());
    eventually("everything is compiled", || {
        let shown = rig.get("/v1/recompilation").json();
        shown["services"] == 2 && shown["done"] == 2
    });
    assert_eq!(
        rig.seen()[1..],
        [
            "service twin dark",
            "service web dark",
            "open",
            "service twin v1 sealed:compiled:one",
            "service web v1 sealed:compiled:one",
            "service web v1 sealed:compiled:one v2=preview sealed:compiled:two",
        ]
    );
    assert_eq!(rig.compiled.load(Ordering::SeqCst), 2);
}

#[test]
fn a_version_that_data_refuses_is_not_activated() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::with_service(dir.path());
    rig.upload("one").expect(201);
    rig.upload("two").expect(201);
    rig.fake.refuse.store(true, Ordering::SeqCst);
    let refused = rig.upload("three");
    refused.refused(500, "not_activated");
    assert!(refused.body.contains("on purpose"));
    let service = rig.get(WEB).json();
    assert_eq!(
        (&service["active_version"], &service["previous_version"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(
        rig.get(VERSIONS).json()["items"][0]["version"],
        3,
        "stored, but dark"
    );
}

#[test]
fn a_lost_token_is_replaced_by_deleting_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(dir.path());
    let lost = rig.token.clone();
    rig.stop();
    std::fs::remove_file(dir.path().join("admin.token")).unwrap();
    let rig = Rig::start(dir.path());
    assert_ne!(rig.token, lost);
    rig.get("/v1/host").expect(200);
}
