//! The admin API against its own description: Schemathesis makes requests of every kind out of it,
//! good and bad, as each role. No answer is a 5xx, and none is other than described.
//!
//! `INSULA_TEST_SCHEMA_SECONDS` asks for more than a few seconds for each role.

use std::process::Command;

use insula_tests::{TestHost, tools};
use serde_json::{Value, json};

use crate::kills::number_from;

const SECONDS: u64 = 10;
/// Requests of one role, at least: a thousand on a machine that does nothing else.
const CASES_MIN: u64 = 30;

/// What an answer must be.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
    response_headers_conformance,response_schema_conformance";

/// A role, and operations that it does without: streams that go on, components (which have tests
/// of their own), the end of the role itself.
struct Role {
    name: &'static str,
    token: Option<String>,
    without: &'static [&'static str],
}

const STREAMS: &[&str] = &["getEvents", "getLogs", "createVersion"];
const STREAMS_AND_ENDS: &[&str] = &[
    "getEvents",
    "getLogs",
    "createVersion",
    "deleteToken",
    "deleteTenant",
];

fn roles(host: &TestHost) -> Vec<Role> {
    let admin = host.admin();
    let token = |name: &str, mut asked: Value| {
        asked["name"] = name.into();
        let made = admin.post("/v1/tokens", &asked);
        made["secret"].as_str().map(str::to_owned)
    };
    let role = |name, asked: Value, without| Role {
        name,
        token: token(name, asked),
        without,
    };
    vec![
        role("host, write", json!({"access": "write"}), STREAMS_AND_ENDS),
        role("host, read", json!({"access": "read"}), STREAMS),
        role(
            "tenant, write",
            json!({"access": "write", "tenant": "alpha"}),
            STREAMS_AND_ENDS,
        ),
        role(
            "tenant, read",
            json!({"access": "read", "tenant": "alpha"}),
            STREAMS,
        ),
        Role {
            name: "nobody",
            token: None,
            without: STREAMS,
        },
    ]
}

#[test]
fn every_answer_is_as_the_api_describes_it() {
    let Some(venv) = tools::tool("VENV") else {
        return;
    };
    let host = TestHost::start();
    let _asked_for = host.tenant("alpha").create().deploy("hello");
    // Of the one above a role may ask the end.
    let witness = host.tenant("witness").create().deploy("hello");
    let dir = tempfile::tempdir().expect("a directory");
    let document = dir.path().join("openapi.json");
    let mut described = host.admin().get("/v1/openapi.json");
    // Names by chance would hit nothing that is there.
    for (parameter, names) in [
        ("tenant", ["alpha", "beta"]),
        ("service", ["hello", "other"]),
    ] {
        described["components"]["parameters"][parameter]["schema"] = json!({"enum": names});
    }
    std::fs::write(&document, described.to_string()).expect("a file");
    let seconds = number_from("INSULA_TEST_SCHEMA_SECONDS").unwrap_or(SECONDS);
    for role in roles(&host) {
        let mut command = Command::new(venv.join("bin/schemathesis"));
        command.arg("run").arg(&document).current_dir(dir.path());
        command.args(["--url", &format!("http://{}", host.admin_address())]);
        command.args(["--checks", CHECKS, "--phases", "examples,coverage,fuzzing"]);
        command.args(["--max-time", &seconds.to_string()]);
        command.args(["--request-timeout", "10", "--no-color"]);
        command.args(["--generation-database", "none", "--continue-on-failure"]);
        for operation in role.without {
            command.args(["--exclude-operation-id", operation]);
        }
        if let Some(token) = &role.token {
            command.args(["--header", &format!("Authorization: Bearer {token}")]);
        }
        let output = tools::run(&mut command);
        let said = tools::said(&output);
        assert!(output.status.success(), "{}: {said}", role.name);
        let cases = said
            .lines()
            .find_map(|line| line.trim().split_once(" generated, "));
        let (cases, rest) = cases.unwrap_or_else(|| panic!("{}: {said}", role.name));
        eprintln!("{}: {cases} requests, {rest}", role.name);
        assert!(
            cases.parse::<u64>().is_ok_and(|cases| cases >= CASES_MIN),
            "{said}"
        );
        assert_eq!(witness.get("/").send().status, 200, "{}", role.name);
    }
    let said = host.said();
    assert!(
        !said.contains("panicked") && !said.contains("ERROR"),
        "{said}"
    );
}
