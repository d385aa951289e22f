//! What is packed is what is unpacked, for any message; and anything else is refused.

use std::time::{Duration, SystemTime};

use insula_types::spec::{ServiceSpec, TenantSpec};
use insula_types::volume::VolumeKind;
use insula_types::{
    Bytes, Digest, Outcome, ServiceId, TenantId, Traffic, VersionNumber, VolumeId, VolumeSpec,
};
use proptest::prelude::*;

use super::*;
use crate::messages::{
    Answer, AtRest, Collect, Collected, Found, IntendedVersion, LogSource, Question, Refusal,
    ServiceIntent, ToData, UsageDelta, VersionDelta,
};
use crate::pool::conduct::{Conduct, STEPS};
use crate::process::walls::Wall;
use crate::storage::Usage;
use crate::tls::Pem;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn version(number: u32) -> VersionNumber {
    VersionNumber::new(number).unwrap()
}

fn traffic() -> impl Strategy<Value = Traffic> {
    prop_oneof![
        Just(Traffic::none()),
        (1..500u32).prop_map(|number| Traffic::whole(version(number))),
        (1..50u32, 1..100u8).prop_map(|(number, percent)| {
            let shares = [
                (version(number), percent),
                (version(number + 1), 100 - percent),
            ];
            Traffic::new(shares.into()).unwrap()
        }),
    ]
}

fn service_spec() -> impl Strategy<Value = ServiceSpec> {
    let env = prop::collection::btree_map("[A-Z]{1,8}", "\\PC{0,30}", 0..4);
    (env, any::<bool>(), 0..6u64).prop_map(|(env, usage_header, which)| {
        let text = match which {
            0 => "{}".to_owned(),
            1 => r#"{"limits":{"memory":"128MiB","fuel":"1T","timeout":"5m"}}"#.to_owned(),
            3 => r#"{"volumes":[{"name":"d","path":"/d","mode":"ro"},{"name":"e","path":"/e"}]}"#
                .to_owned(),
            4 => {
                r#"{"outbound":["https://api.example.com","http://*.example.org:8081"]}"#.to_owned()
            }
            2 => r#"{"routes":["api.example.com/v2/*","example.com/"]}"#.to_owned(),
            _ => r#"{"sticky_header":"X-User-Id"}"#.to_owned(),
        };
        let spec: ServiceSpec = serde_json::from_str(&text).unwrap();
        ServiceSpec {
            env,
            usage_header,
            ..spec
        }
    })
}

fn service() -> impl Strategy<Value = ToData> {
    let versions = prop::collection::vec((1..900u32, any::<[u8; 32]>(), any::<bool>()), 0..6);
    (
        1..u64::MAX,
        service_spec(),
        traffic(),
        versions,
        "[a-z][a-z0-9]{0,10}",
    )
        .prop_map(|(id, spec, traffic, versions, name)| {
            let intended = |(number, digest, has)| IntendedVersion {
                number: version(number),
                digest: Digest::new(digest),
                artefact: Option::from(has).filter(|has: &bool| *has).map(|_| file()),
            };
            ToData::Service(Box::new(ServiceIntent {
                id: ServiceId::new(id),
                tenant: TenantId::new(id / 2),
                name: name.parse().unwrap(),
                spec,
                traffic,
                awaited: versions
                    .iter()
                    .map(|(number, ..)| version(*number))
                    .collect(),
                mounts: versions
                    .iter()
                    .map(|(id, ..)| VolumeId::new((*id).into()))
                    .collect(),
                versions: versions.into_iter().map(intended).collect(),
            }))
        })
}

fn tenant() -> impl Strategy<Value = ToData> {
    (1..u64::MAX, 0..3usize).prop_map(|(id, which)| {
        let text = [
            "{}",
            r#"{"cpu":{"shares":"high","reservation":"250m","limit":2},"memory":{"limit":"1GiB"}}"#,
            r#"{"requests":{"in_flight":7,"queued":0,"per_second":9},"storage":{"limit":5}}"#,
        ][which];
        let spec: TenantSpec = serde_json::from_str(text).unwrap();
        let (id, name) = (TenantId::new(id), "acme".parse().unwrap());
        ToData::Tenant {
            id,
            name,
            spec,
            promised: Bytes::mib(7),
        }
    })
}

fn to_data() -> impl Strategy<Value = ToData> {
    prop_oneof![
        service(),
        tenant(),
        any::<u64>().prop_map(|id| ToData::DropTenant(TenantId::new(id))),
        any::<u64>().prop_map(|id| ToData::DropService(ServiceId::new(id))),
        (any::<u64>(), 1..1u64 << 40, 1..9u64).prop_map(|(id, size, inodes)| ToData::Volume {
            id: VolumeId::new(id),
            tenant: TenantId::new(id / 3),
            spec: quota(size, inodes),
            directory: file(),
        }),
        any::<u64>().prop_map(|id| ToData::DropVolume(VolumeId::new(id))),
        (any::<u64>(), 1..1u64 << 40).prop_map(|(id, size)| ToData::CopyVolume {
            from: VolumeId::new(id),
            to: file(),
            spec: quota(size, 3),
        }),
        (any::<u64>(), any::<u64>(), found())
            .prop_map(|(id, cpu_ns, found)| { ToData::Answer(Answer { id, cpu_ns, found }) }),
        Just(()).prop_map(|()| ToData::Open),
        Just(()).prop_map(|()| ToData::Recount),
        (any::<bool>(), any::<u64>()).prop_map(|(usage, control_cpu_ns)| {
            let what = if usage {
                Collect::Usage
            } else {
                Collect::Families
            };
            ToData::Collect {
                what,
                control_cpu_ns,
            }
        }),
        any::<Vec<u8>>().prop_map(|bytes| ToData::Certificate(Pem {
            certificate: bytes.clone(),
            key: bytes,
        })),
        (any::<u32>()).prop_map(|ms| ToData::Drain {
            deadline: Duration::from_millis(ms.into()),
            at_rest: if ms % 2 == 0 {
                AtRest::Close
            } else {
                AtRest::AnswerOnce
            },
        }),
    ]
}

fn quota(size: u64, inodes: u64) -> VolumeSpec {
    let size = Bytes::new(size).unwrap();
    let kind = if inodes.is_multiple_of(2) {
        VolumeKind::Files
    } else {
        VolumeKind::Store
    };
    VolumeSpec { size, inodes, kind }
}

fn found() -> impl Strategy<Value = Result<Found, String>> {
    let addresses = prop::collection::vec((any::<std::net::IpAddr>(), any::<u16>()), 0..4);
    let roots = prop::collection::vec(any::<Vec<u8>>(), 0..4);
    prop_oneof![
        addresses.prop_map(|all| Ok(Found::Addresses(all.into_iter().map(Into::into).collect()))),
        roots.prop_map(|roots| Ok(Found::Roots(roots))),
        "\\PC*".prop_map(Err),
    ]
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        any::<u64>().prop_map(|id| Refusal::UnknownTenant(TenantId::new(id))),
        any::<[u8; 32]>().prop_map(|digest| Refusal::ArtefactMissing(Digest::new(digest))),
        (any::<[u8; 32]>(), "\\PC*").prop_map(|(digest, reason)| Refusal::ArtefactRefused {
            digest: Digest::new(digest),
            reason,
        }),
        "\\PC*".prop_map(Refusal::Envelope),
        any::<u64>().prop_map(|id| Refusal::UnknownVolume(VolumeId::new(id))),
        "\\PC*".prop_map(Refusal::Storage),
    ]
}

fn collected() -> impl Strategy<Value = Collected> {
    let usage = (
        any::<u64>(),
        any::<[u64; Outcome::ALL.len()]>(),
        any::<[u64; 5]>(),
    )
        .prop_map(
            |(id, requests, [fuel, cpu_ns, memory_byte_ms, bytes_in, bytes_out])| UsageDelta {
                tenant: TenantId::new(id),
                service: ServiceId::new(id),
                requests,
                fuel,
                cpu_ns,
                memory_byte_ms,
                bytes_in,
                bytes_out,
            },
        );
    let conduct =
        (any::<u32>(), prop::collection::vec(any::<u32>(), STEPS)).prop_map(|(failed, ended)| {
            VersionDelta {
                service: ServiceId::new(3),
                version: version(failed.max(1)),
                conduct: Conduct {
                    failed,
                    ended: ended.try_into().unwrap(),
                },
            }
        });
    (
        prop::collection::vec(usage, 0..4),
        prop::collection::vec(conduct, 0..4),
        prop::option::of("\\PC*"),
    )
        .prop_map(|(usage, versions, metrics)| Collected {
            volumes: versions
                .iter()
                .map(|delta: &VersionDelta| {
                    let used = Usage {
                        bytes: delta.conduct.failed.into(),
                        inodes: 7,
                    };
                    (VolumeId::new(3), used)
                })
                .collect(),
            broken: versions
                .iter()
                .map(|_| ("a".parse().unwrap(), "b".parse().unwrap()))
                .collect(),
            usage,
            versions,
            metrics,
        })
}

fn record() -> impl Strategy<Value = LogRecord> {
    let source = prop_oneof![
        Just(LogSource::Stdout),
        Just(LogSource::Stderr),
        Just(LogSource::Host)
    ];
    (
        any::<u64>(),
        1..u32::MAX,
        any::<u32>(),
        "[a-f0-9]{0,32}",
        source,
        "[\\PC\t]{0,80}",
    )
        .prop_map(
            |(service, number, seconds, request_id, source, text)| LogRecord {
                service: ServiceId::new(service),
                version: version(number),
                time: SystemTime::UNIX_EPOCH
                    + Duration::new(seconds.into(), seconds % 1_000_000_000),
                request_id,
                source,
                text,
                dropped: service,
            },
        )
}

fn from_data() -> impl Strategy<Value = FromData> {
    prop_oneof![
        prop::option::of("\\PC*").prop_map(|missing| {
            let name = "a wall".to_owned();
            FromData::Ready(vec![Wall { name, missing }])
        }),
        "\\PC*".prop_map(FromData::Failed),
        (any::<u64>(), prop::option::of(refusal())).prop_map(|(seq, refusal)| FromData::Done {
            seq,
            result: refusal.map_or(Ok(()), Err),
        }),
        (any::<u64>(), collected()).prop_map(|(seq, collected)| FromData::Collected {
            seq,
            collected: Box::new(collected),
        }),
        prop::collection::vec(record(), 0..5).prop_map(FromData::Logs),
        (any::<u64>(), "\\PC*", any::<u16>()).prop_map(|(id, name, port)| FromData::Asks {
            id,
            tenant: TenantId::new(id / 2),
            question: if port == 0 {
                Question::Roots
            } else {
                Question::Addresses { name, port }
            },
        }),
    ]
}

/// All that there is of a message, its files by their kernel identity.
fn shown(command: &Command) -> String {
    use std::os::unix::fs::MetadataExt;
    match &command.body {
        ToData::Service(intent) => {
            let files = intent.versions.iter().map(|version| {
                let file = version.artefact.as_ref()?;
                Some(file.metadata().unwrap().ino())
            });
            let files: Vec<_> = files.collect();
            let versions = intent.versions.iter();
            let versions: Vec<_> = versions.map(|v| (v.number, v.digest)).collect();
            let ServiceIntent {
                id,
                tenant,
                name,
                spec,
                traffic,
                awaited,
                ..
            } = &**intent;
            let seq = command.seq;
            let parts = (seq, id, tenant, name, spec, traffic, awaited);
            format!("{parts:?} {versions:?} {files:?}")
        }
        ToData::Certificate(Pem { certificate, key }) => {
            format!("{} {certificate:?} {key:?}", command.seq)
        }
        _ => format!("{command:?}"),
    }
}

fn shown_of_data(message: &FromData) -> String {
    match message {
        FromData::Logs(records) => {
            let all = records.iter().map(|r| {
                format!(
                    "{r:?} {:?} {} {} {}",
                    r.time, r.request_id, r.text, r.dropped
                )
            });
            all.collect::<Vec<_>>().join("\n")
        }
        _ => format!("{message:?}"),
    }
}

proptest! {
    #[test]
    fn commands_arrive_as_they_were(seq in any::<u64>(), body in to_data()) {
        let command = Command { seq, body };
        let before = shown(&command);
        let after = Command::unpack(command.pack().unwrap()).unwrap();
        prop_assert_eq!(shown(&after), before);
    }

    #[test]
    fn reports_arrive_as_they_were(message in from_data()) {
        let before = shown_of_data(&message);
        let after = FromData::unpack(message.pack().unwrap()).unwrap();
        prop_assert_eq!(shown_of_data(&after), before);
    }

    #[test]
    fn a_damaged_report_is_refused_or_another_valid_one(
        message in from_data(), edits in edits(),
    ) {
        let mut parcel = message.pack().unwrap();
        damage(&mut parcel.payload, edits);
        if let Ok(message) = FromData::unpack(parcel) {
            if let FromData::Logs(records) = &message {
                prop_assert!(records.iter().all(|record| check(record).is_ok()));
            }
            let before = shown_of_data(&message);
            let after = FromData::unpack(message.pack().unwrap()).unwrap();
            prop_assert_eq!(shown_of_data(&after), before);
        }
    }

    #[test]
    fn a_damaged_command_is_refused_or_another_valid_one(
        seq in any::<u64>(), body in to_data(), edits in edits(), lost in 0..3usize,
    ) {
        let mut parcel = Command { seq, body }.pack().unwrap();
        damage(&mut parcel.payload, edits);
        parcel.files.truncate(parcel.files.len().saturating_sub(lost));
        let sent = parcel.files.len();
        if let Ok(command) = Command::unpack(parcel) {
            let before = shown(&command);
            let parcel = command.pack().unwrap();
            prop_assert_eq!(parcel.files.len(), sent, "no file is lost, and none is there twice");
            prop_assert_eq!(shown(&Command::unpack(parcel).unwrap()), before);
        }
    }

    #[test]
    fn a_damaged_stream_is_cut_into_frames_that_hold_what_they_say(
        messages in prop::collection::vec(from_data(), 1..4), edits in edits(),
        piece in 1..300usize,
    ) {
        let mut stream = Vec::new();
        for message in messages {
            let parcel = message.pack().unwrap();
            stream.extend(super::super::frame::encode(&parcel.payload, 0).unwrap());
        }
        damage(&mut stream, edits);
        let mut decoder = super::super::frame::Decoder::default();
        let mut taken = 0;
        'stream: for piece in stream.chunks(piece) {
            decoder.push(piece);
            loop {
                match decoder.next() {
                    Ok(Some(frame)) => {
                        taken += super::super::frame::HEADER_BYTES + frame.payload.len();
                        prop_assert!(taken <= stream.len());
                        let files = Vec::new();
                        let _ = FromData::unpack(Parcel { payload: frame.payload, files });
                    }
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
        }
    }
}

/// What may happen to bytes on their way.
#[derive(Debug, Clone)]
enum Edit {
    Byte(u8),
    Cut(usize),
    Again(usize),
    Insert(Vec<u8>),
    /// In the place of the number, text or word that begins there or after it.
    Value(&'static str),
}

fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, Edit)>> {
    let values = vec![
        "null",
        "-1",
        "0",
        "18446744073709551615",
        "18446744073709551616",
        "1e400",
        "0.1",
        "[]",
        "{}",
        "\"\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "true",
        "[[[[[[[[]]]]]]]]",
    ];
    let edit = prop_oneof![
        1 => any::<u8>().prop_map(Edit::Byte),
        1 => (1..40usize).prop_map(Edit::Cut),
        1 => (1..40usize).prop_map(Edit::Again),
        1 => prop::collection::vec(any::<u8>(), 1..9).prop_map(Edit::Insert),
        4 => prop::sample::select(values).prop_map(Edit::Value),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), edit), 1..5)
}

fn damage(bytes: &mut Vec<u8>, edits: Vec<(prop::sample::Index, Edit)>) {
    for (at, edit) in edits {
        if bytes.is_empty() {
            return;
        }
        let at = at.index(bytes.len());
        let whole = bytes.len();
        let end = |length: usize| whole.min(at + length);
        match edit {
            Edit::Byte(byte) => bytes[at] = byte,
            Edit::Cut(length) => drop(bytes.drain(at..end(length))),
            Edit::Again(length) => {
                let piece = bytes[at..end(length)].to_vec();
                bytes.splice(at..at, piece);
            }
            Edit::Insert(piece) => drop(bytes.splice(at..at, piece)),
            Edit::Value(value) => {
                let is_end = |byte: &u8| matches!(byte, b',' | b']' | b'}');
                let Some(colon) = bytes[at..].iter().position(|byte| *byte == b':') else {
                    continue;
                };
                let from = at + colon + 1;
                let length = bytes[from..].iter().position(is_end).unwrap_or(0);
                bytes.splice(from..from + length, value.bytes());
            }
        }
    }
}

#[test]
fn files_and_message_must_fit_together() {
    let command = || Command {
        seq: 1,
        body: ToData::Service(Box::new(ServiceIntent {
            id: ServiceId::new(1),
            tenant: TenantId::new(1),
            name: "a".parse().unwrap(),
            spec: ServiceSpec::default(),
            traffic: Traffic::none(),
            versions: vec![IntendedVersion {
                number: version(1),
                digest: Digest::new([0; 32]),
                artefact: Some(file()),
            }],
            awaited: Vec::new(),
            mounts: Vec::new(),
        })),
    };
    let mut lost = command().pack().unwrap();
    lost.files.clear();
    assert!(matches!(
        Command::unpack(lost),
        Err(MessageError::Files { sent: 0 })
    ));
    let mut added = command().pack().unwrap();
    added.files.push(file().into());
    assert!(matches!(
        Command::unpack(added),
        Err(MessageError::Files { sent: 2 })
    ));
    let mut report = FromData::Ready(Vec::new()).pack().unwrap();
    report.files.push(file().into());
    assert!(FromData::unpack(report).is_err());
}

#[test]
fn a_line_that_could_forge_another_is_refused() {
    let record = |text: String, request_id: &str| LogRecord {
        service: ServiceId::new(1),
        version: version(1),
        time: SystemTime::UNIX_EPOCH,
        request_id: request_id.to_owned(),
        source: LogSource::Stdout,
        text,
        dropped: 0,
    };
    let refused = |text: &str, id: &str| {
        let parcel = FromData::Logs(vec![record(text.to_owned(), id)]).pack();
        FromData::unpack(parcel.unwrap()).is_err()
    };
    assert!(!refused("a\tb", "0123"));
    assert!(refused("a\nb", "0123"));
    assert!(refused("a\u{1b}[2J", "0123"));
    assert!(refused("a", "01\r\n23"));
    assert!(refused(
        &"x".repeat(LOG_LINE_MAX_BYTES * ESCAPED + 1),
        "0123"
    ));
}
