//! Keys and values of guests (`wasi:keyvalue`): who sees them, what they take, what a crash leaves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use insula_tests::wait::{holds, until};
use insula_tests::{Service, TestHost};
use serde_json::{Value, json};

/// A store of a tenant's.
fn make_store(host: &TestHost, tenant: &str, name: &str, size: &str) {
    let path = format!("/v1/tenants/{tenant}/volumes/{name}");
    host.admin()
        .put(&path, &json!({"size": size, "kind": "store"}));
}

/// A service that may open these stores.
fn counter(host: &TestHost, tenant: &str, name: &str, stores: &Value) -> Service {
    let owner = host.tenant(tenant).create();
    let limits = json!({"fuel": "100G", "timeout": "60s"});
    let spec = json!({"stores": stores, "limits": limits});
    owner.service(name).spec(spec).deploy("counter")
}

/// A tenant with one store, and a service that may open it.
fn alone(host: &TestHost, tenant: &str, size: &str) -> Service {
    host.tenant(tenant).create();
    make_store(host, tenant, "counters", size);
    counter(host, tenant, "one", &json!([{"name": "counters"}]))
}

/// The answer, or the error that the guest saw.
fn send(to: &Service, method: &str, target: &str, body: &[u8]) -> Result<String, String> {
    let request = to.request(method, target).body(body);
    let answer = request.patience(Duration::from_secs(60)).send();
    match answer.status {
        200 => Ok(answer.text()),
        404 => Ok("nothing".to_owned()),
        409 => Err(answer.text().trim().to_owned()),
        status => panic!("{method} {target}: {status} {}", answer.text()),
    }
}

fn get(from: &Service, target: &str) -> Result<String, String> {
    send(from, "GET", target, b"")
}

fn post(to: &Service, target: &str) -> Result<String, String> {
    send(to, "POST", target, b"")
}

fn ok(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn volume(host: &TestHost, tenant: &str, name: &str) -> Value {
    let path = format!("/v1/tenants/{tenant}/volumes/{name}");
    host.admin().get(&path)
}

#[test]
fn what_one_request_sets_the_next_one_finds_and_a_crash_keeps_it() {
    let host = TestHost::start();
    let one = alone(&host, "a", "4MiB");
    assert_eq!(get(&one, "/"), ok("1\n"));
    assert_eq!(get(&one, "/"), ok("2\n"));
    assert_eq!(get(&one, "/k"), ok("nothing"));
    send(&one, "PUT", "/k", b"hello").expect("set");
    host.crash_and_restart();
    assert_eq!(get(&one, "/k"), ok("hello"));
    assert_eq!(get(&one, "/"), ok("3\n"));
    assert_eq!(post(&one, "/k?do=exists"), ok("true\n"));
    assert_eq!(post(&one, "/?do=list"), ok("visits\nk\n"));
    send(&one, "DELETE", "/k", b"").expect("deleted");
    host.restart();
    assert_eq!(get(&one, "/k"), ok("nothing"));
    assert_eq!(get(&one, "/"), ok("4\n"));
    assert_eq!(post(&one, "/m?do=many&n=100&bytes=1000"), ok("100\n"));
    // What it takes is in the books, and in the metrics.
    let used = volume(&host, "a", "counters")["used_bytes"].as_u64();
    let used = used.expect("counted");
    assert!((70_000..4 << 20).contains(&used), "{used}");
    let metrics = host.metrics();
    let stored = metrics.count("insula_storage_bytes", &[("tenant", "a")]);
    assert_eq!(stored, used);
    let on_disk: u64 = files_below(&host.data().join("volumes"));
    assert!(used >= on_disk, "{used} of {on_disk}");
}

/// Bytes of all files below a directory.
fn files_below(path: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(path).expect("a directory");
    let size = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.expect("an entry");
        let meta = entry.metadata().expect("its size");
        if meta.is_dir() {
            files_below(&entry.path())
        } else {
            meta.len()
        }
    };
    entries.map(size).sum()
}

#[test]
fn services_of_a_tenant_share_a_store_and_other_tenants_have_their_own() {
    let host = TestHost::start();
    let one = alone(&host, "a", "4MiB");
    let reads = json!([{"name": "counters", "mode": "ro"}]);
    let two = counter(&host, "a", "two", &reads);
    let none = counter(&host, "a", "none", &json!([]));
    let other = alone(&host, "b", "4MiB");
    send(&one, "PUT", "/k", b"of a").expect("set");
    assert_eq!(get(&two, "/k"), ok("of a"));
    assert_eq!(get(&other, "/k"), ok("nothing"));
    send(&other, "PUT", "/k", b"of b").expect("set");
    assert_eq!(get(&one, "/k"), ok("of a"));
    assert_eq!(post(&other, "/?do=list"), ok("k\n"));
    // To be read only is not to be changed, in any way.
    let denied = Err("this service may not do that to this store".to_owned());
    assert_eq!(send(&two, "PUT", "/k", b"x"), denied);
    assert_eq!(send(&two, "DELETE", "/k", b""), denied);
    assert_eq!(post(&two, "/k?do=increment"), denied);
    assert_eq!(post(&two, "/k?do=many"), denied);
    assert_eq!(post(&two, "/?do=list"), ok("k\n"));
    // What is not listed is not opened, whether it is there or not.
    make_store(&host, "a", "secret", "1MiB");
    for service in [&one, &none, &other] {
        for name in ["secret", "nothing", "", "a/counters", "../counters"] {
            assert_eq!(get(service, &format!("/k?store={name}")), denied, "{name}");
        }
    }
    assert_eq!(get(&none, "/k"), denied);
    // A listing that changes takes effect at once.
    let spec = json!({"stores": [{"name": "counters"}]});
    host.admin().put(&none.path(), &spec);
    assert_eq!(get(&none, "/k"), ok("of a"));
}

#[test]
fn a_quota_holds_and_says_so() {
    let host = TestHost::start();
    let one = alone(&host, "a", "2MiB");
    let said = post(&one, "/f?do=fill&n=1000&bytes=20000").expect("an answer");
    let (count, error) = said.trim().split_once(' ').expect("an error");
    assert_eq!(error, "quota exceeded: the volume is full");
    let count: u64 = count.parse().expect("a number");
    // Each in 32 KiB, and a part of the volume is for removing.
    assert!(count > 30, "{count}");
    let used = volume(&host, "a", "counters")["used_bytes"].as_u64();
    assert!(used.is_some_and(|used| used <= 2 << 20), "{used:?}");
    // What is there can be read, and taken away; then there is room again.
    let first = get(&one, "/f0").expect("a value");
    assert_eq!(first.len(), 20_000);
    for number in 0..count {
        send(&one, "DELETE", &format!("/f{number}"), b"").expect("deleted");
    }
    let again = post(&one, "/f?do=fill&n=30&bytes=20000").expect("an answer");
    assert_eq!(again, "30\n");
    // The same store when the tenant's limit is what is small.
    let spec = json!({"storage": {"limit": "1MiB"}});
    host.admin().put("/v1/tenants/a", &spec);
    let path = "/v1/tenants/a/volumes/counters";
    host.admin()
        .put(path, &json!({"size": "64MiB", "kind": "store"}));
    let said = post(&one, "/g?do=fill&n=1000&bytes=20000").expect("an answer");
    assert!(
        said.ends_with("quota exceeded: the tenant's storage is full\n"),
        "{said}"
    );
}

#[test]
fn increments_of_two_services_at_once_are_all_counted() {
    let host = TestHost::start();
    let one = alone(&host, "a", "4MiB");
    let two = counter(&host, "a", "two", &json!([{"name": "counters"}]));
    let per_client = 100;
    std::thread::scope(|scope| {
        for service in [&one, &two, &one, &two] {
            scope.spawn(move || {
                for _ in 0..per_client {
                    post(service, "/n?do=increment&n=3").expect("counted");
                }
            });
        }
    });
    let sum = 4 * per_client * 3;
    assert_eq!(get(&one, "/n"), ok(&sum.to_string()));
    assert_eq!(get(&two, "/n"), ok(&sum.to_string()));
}

#[test]
fn what_was_acknowledged_when_the_host_was_killed_is_there() {
    let host = TestHost::start();
    let one = alone(&host, "a", "16MiB");
    let mut acknowledged = 0;
    for round in 0..5 {
        let kill_at = acknowledged + 7 + round * 5;
        let last = AtomicU64::new(acknowledged);
        let increment = one.request("POST", "/n?do=increment");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    match increment.clone().try_send() {
                        Ok(answer) if answer.status == 200 => {
                            let sum = answer.text().trim().parse().expect("a number");
                            last.store(sum, Ordering::Relaxed);
                        }
                        _ => break,
                    }
                }
            });
            // Killed while the next one is on its way.
            until(Duration::from_secs(60), "it counts", || {
                let last = last.load(Ordering::Relaxed);
                holds(last >= kill_at, last.to_string())
            });
            host.kill();
        });
        acknowledged = last.into_inner();
        host.start_again();
        let there: u64 = get(&one, "/n").expect("a value").parse().expect("a number");
        // One more may have happened, whose answer did not get through.
        let possible = acknowledged..=acknowledged + 1;
        assert!(possible.contains(&there), "{there} of {acknowledged}");
        acknowledged = there;
    }
    assert!(acknowledged > 60, "{acknowledged}");
}

#[test]
fn hostile_sizes_and_numbers_are_refused() {
    let host = TestHost::start();
    let one = alone(&host, "a", "64MiB");
    let long = "k".repeat(1_025);
    let refused = send(&one, "PUT", &format!("/{long}"), b"x");
    assert_eq!(
        refused,
        Err("the key has 1025 bytes, more than 1024".to_owned())
    );
    send(&one, "PUT", &format!("/{}", &long[1..]), b"x").expect("set");
    let large = vec![7; (1 << 20) + 1];
    let refused = send(&one, "PUT", "/v", &large);
    assert!(refused.is_err_and(|error| error.contains("1048577")));
    send(&one, "PUT", "/v", &large[1..]).expect("set");
    let refused = post(&one, "/m?do=many&n=1001");
    assert_eq!(
        refused,
        Err("1001 keys at once are more than 1000".to_owned())
    );
    let refused = post(&one, "/m?do=many&n=5&bytes=1000000");
    assert!(refused.is_err_and(|error| error.contains("at once are more than 4194304")));
    assert_eq!(post(&one, "/m?do=many&n=0"), ok("0\n"));
    send(&one, "PUT", "/n", b"18446744073709551615").expect("set");
    let refused = post(&one, "/n?do=increment");
    assert_eq!(refused, Err("the sum is not below 2^64".to_owned()));
    send(&one, "PUT", "/n", b"many").expect("set");
    assert!(post(&one, "/n?do=increment").is_err());
    assert_eq!(post(&one, "/?do=handles&n=1000"), ok("1000\n"));
    // More handles than a guest may have: that guest ends, and nothing else.
    let answer = one.request("POST", "/?do=handles&n=100000").send();
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert_eq!(get(&one, "/n"), ok("many"));
    assert!(!host.said().contains("panicked"), "{}", host.said());
}

#[test]
fn a_store_is_no_directory_and_a_directory_is_no_store() {
    let host = TestHost::start();
    let one = alone(&host, "a", "4MiB");
    send(&one, "PUT", "/k", b"v1").expect("set");
    let admin = host.admin();
    admin.put("/v1/tenants/a/volumes/data", &json!({}));
    let service = "/v1/tenants/a/services/wrong";
    for spec in [
        json!({"volumes": [{"name": "counters", "path": "/c"}]}),
        json!({"stores": [{"name": "data"}]}),
    ] {
        let refused = admin.json("PUT", service, &spec).send();
        let told = (refused.status, refused.problem());
        assert_eq!(told, (422, "volume_kind".to_owned()), "{spec}");
    }
    let kind = json!({"kind": "files"});
    let refused = admin
        .json("PUT", "/v1/tenants/a/volumes/counters", &kind)
        .send();
    let told = (refused.status, refused.problem());
    assert_eq!(told, (422, "volume_kind".to_owned()));
    let unknown = json!({"stores": [{"name": "nothing"}]});
    let refused = admin.json("PUT", service, &unknown).send();
    let told = (refused.status, refused.problem());
    assert_eq!(told, (422, "unknown_volume".to_owned()));
    let used = admin
        .request("DELETE", "/v1/tenants/a/volumes/counters")
        .send();
    let told = (used.status, used.problem());
    assert_eq!(told, (409, "volume_in_use".to_owned()));
    // Copies are stores too: one to be read, and one that goes its own way.
    for (what, name) in [("snapshot", "before"), ("clone", "twin")] {
        let path = format!("/v1/tenants/a/volumes/counters/{what}");
        let made = admin.json("POST", &path, &json!({"name": name})).send();
        assert_eq!(made.status, 201, "{}", made.text());
        assert_eq!(volume(&host, "a", name)["kind"], "store");
    }
    send(&one, "PUT", "/k", b"v2").expect("set");
    let stores = json!([{"name": "before", "mode": "ro"}, {"name": "twin"}]);
    let copies = counter(&host, "a", "copies", &stores);
    assert_eq!(get(&copies, "/k?store=before"), ok("v1"));
    send(&copies, "PUT", "/k?store=twin", b"v3").expect("set");
    assert_eq!(get(&copies, "/k?store=twin"), ok("v3"));
    assert_eq!(get(&one, "/k"), ok("v2"));
    let writes = json!({"stores": [{"name": "before"}]});
    let refused = admin.json("PUT", service, &writes).send();
    let told = (refused.status, refused.problem());
    assert_eq!(told, (422, "volume_read_only".to_owned()));
}
