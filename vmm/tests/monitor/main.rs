//! A monitor process from its host's side: started, spoken with, left alone, killed.
//!
//! This program is also the monitor: started with [`VERB`], it is one.

mod host;
mod kernel;

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use insula_vmm::machine::Phase;
use insula_vmm::monitor::protocol::{Cause, Reply, Request, Statistics};
use insula_vmm::monitor::wire::Outgoing;
use insula_vmm::monitor::{CallError, Client};
use libtest_mimic::{Arguments, Failed, Trial};

use host::{Monitored, PATIENCE, until};

/// The allocator of the program that monitors are started from: the filters are made for it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub(crate) const VERB: &str = "monitor";

type Outcome = Result<(), Failed>;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(VERB) {
        return insula_vmm::monitor::run(&words.next().unwrap_or_default());
    }
    let arguments = Arguments::from_args();
    let tests = vec![
        Trial::test("a_life_from_start_to_power_off", whole_life),
        Trial::test("a_host_that_dies_is_succeeded", succession),
        Trial::test("a_monitor_that_is_killed_is_noticed", killed),
        Trial::test("what_cannot_start_says_why", bad_kernel),
        Trial::test("what_is_no_packet_harms_nobody", nonsense),
        Trial::test("it_is_ended_by_its_host", ended),
        Trial::test("it_is_in_jail", in_jail),
    ];
    libtest_mimic::run(&arguments, tests).exit_code()
}

fn statistics(client: &Client) -> Result<Statistics, Failed> {
    match client.call(&Request::Statistics, &Outgoing::default(), PATIENCE)? {
        Reply::Statistics { of } => Ok(*of),
        other => Err(format!("{other:?}").into()),
    }
}

fn expect(text: &str, wanted: &str) -> Outcome {
    if text == wanted {
        return Ok(());
    }
    Err(format!("{text:?} instead of {wanted:?}").into())
}

fn whole_life() -> Outcome {
    let Some(monitored) = Monitored::start()? else {
        return Ok(());
    };
    let mut terminal = monitored.terminal(&monitored.client)?;
    expect(&terminal.read_text(1)?, ">")?;
    terminal.socket.write_all(b"abc")?;
    expect(&terminal.read_text(3)?, "abc")?;
    let running = statistics(&monitored.client)?;
    assert_eq!(running.phase, Phase::Running);
    assert!(running.console_written_bytes >= 4);
    assert!(running.exits.iter().any(|count| *count > 0));
    assert_eq!(running.devices[0].kind, "block");

    monitored.order(&Request::Pause)?;
    terminal.socket.write_all(b"d")?;
    assert_eq!(statistics(&monitored.client)?.phase, Phase::Paused);
    terminal
        .socket
        .set_read_timeout(Some(Duration::from_millis(200)))?;
    assert!(terminal.socket.read(&mut [0; 1]).is_err(), "it is paused");
    let refused = monitored.order(&Request::Pause).expect_err("it is paused");
    assert!(matches!(refused, CallError::Refused(_)), "{refused}");
    monitored.order(&Request::Resume)?;
    expect(&terminal.read_text(1)?, "d")?;
    // Nobody in this guest listens to it, and it goes on.
    monitored.order(&Request::PowerButton)?;

    terminal.socket.write_all(b"q")?;
    expect(&terminal.read_text(1)?, "q")?;
    let (status, record) = monitored.end()?;
    let record = record.ok_or("no record")?;
    assert_eq!(record.cause, Cause::PoweredOff);
    expect(&record.detail, "the guest powered itself off")?;
    assert!(status.success(), "{status}");
    Ok(())
}

fn succession() -> Outcome {
    let Some(mut monitored) = Monitored::start()? else {
        return Ok(());
    };
    monitored.terminal(&monitored.client)?.read_text(1)?;
    let successor = monitored.connect()?;
    drop(std::mem::replace(&mut monitored.client, successor));
    assert_eq!(statistics(&monitored.client)?.phase, Phase::Running);
    assert_eq!(monitored.client.monitor_pid()?, monitored.child.id());
    let mut terminal = monitored.terminal(&monitored.client)?;
    expect(&terminal.read_text(1)?, ">")?;
    terminal.socket.write_all(b"xq")?;
    expect(&terminal.read_text(2)?, "xq")?;
    monitored.end()?;
    Ok(())
}

fn killed() -> Outcome {
    let Some(mut monitored) = Monitored::start()? else {
        return Ok(());
    };
    monitored.child.kill()?;
    until("the connection ends", || {
        statistics(&monitored.client).is_err()
    })?;
    let (status, record) = monitored.end()?;
    assert!(!status.success());
    assert_eq!(record, None);
    Ok(())
}

fn bad_kernel() -> Outcome {
    let Some(monitored) = Monitored::born(b"#!/bin/sh\necho no kernel\n")? else {
        return Ok(());
    };
    let refused = monitored.describe().expect_err("no kernel");
    let why = refused.message().unwrap_or_default().to_owned();
    assert!(why.contains("neither a 64-bit bzImage"), "{why}");
    let (status, record) = monitored.end()?;
    let record = record.ok_or("no record")?;
    assert_eq!(record.cause, Cause::Setup);
    expect(&record.detail, &why)?;
    assert_eq!(status.code(), Some(1));
    Ok(())
}

fn nonsense() -> Outcome {
    let Some(monitored) = Monitored::start()? else {
        return Ok(());
    };
    for words in [
        &b"\0\0\0\0"[..],
        b"{}",
        br#"{"version":9,"body":null}"#,
        &[b'x'; 90_000],
    ] {
        let answer = monitored.say(words)?;
        assert!(!answer.contains("done"), "{answer}");
    }
    assert_eq!(statistics(&monitored.client)?.phase, Phase::Running);
    // Far more connections than there is room for: the newest is served.
    for _ in 0..20 {
        assert_eq!(statistics(&monitored.connect()?)?.phase, Phase::Running);
    }
    monitored.connect()?.order(
        &Request::End {
            cause: Cause::Stopped,
        },
        &Outgoing::default(),
        PATIENCE,
    )?;
    monitored.end()?;
    Ok(())
}

fn ended() -> Outcome {
    for cause in [Cause::Stopped, Cause::Reset] {
        let Some(monitored) = Monitored::start()? else {
            return Ok(());
        };
        monitored.order(&Request::End { cause })?;
        let (status, record) = monitored.end()?;
        assert_eq!(record.map(|record| record.cause), Some(cause));
        assert!(status.success());
    }
    Ok(())
}

fn in_jail() -> Outcome {
    let Some(monitored) = Monitored::start()? else {
        return Ok(());
    };
    let process = format!("/proc/{}", monitored.child.id());
    for task in std::fs::read_dir(format!("{process}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let line = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name));
            line.map(|line| {
                line.split_whitespace()
                    .skip(1)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
        };
        assert_eq!(line("Seccomp:").as_deref(), Some("2"), "{status}");
        assert_eq!(line("NoNewPrivs:").as_deref(), Some("1"), "{status}");
        assert_eq!(
            line("CapEff:").as_deref(),
            Some("0000000000000000"),
            "{status}"
        );
        if rustix::process::geteuid().is_root() {
            let user = host::USER.to_string();
            assert_eq!(line("Uid:"), Some([user.as_str(); 4].join(" ")), "{status}");
        }
    }
    monitored.order(&Request::End {
        cause: Cause::Stopped,
    })?;
    monitored.end()?;
    Ok(())
}
