//! Answers that go on: a service's log, the host's events.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::sync::broadcast::error::RecvError;

use crate::control::http_types::{Call, Reply};
use crate::control::logs::LINES_MAX;
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, auth};

/// How often a silent event stream shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A place among the streams; given back when dropped.
pub(super) struct Place(Rc<Control>);

impl Place {
    pub(super) fn take(control: &Rc<Control>) -> Result<Self, Problem> {
        let permit = control.streams.try_acquire().map_err(|_| {
            Problem::new(
                Code::HostBusy,
                "as many streams as there can be are followed",
            )
            .retry_after(10)
        })?;
        permit.forget();
        Ok(Self(Rc::clone(control)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.add_permits(1);
    }
}

/// When an answer that goes on has to end: the host stops, or its token is not valid any more.
pub(super) fn ended(control: &Rc<Control>, token: u64) -> impl Future<Output = ()> + 'static {
    let mut stopping = control.stopping.subscribe();
    let control = Rc::clone(control);
    async move {
        // Both branches only wait.
        tokio::select! {
            // An error means that the host is gone, which is the same.
            _ = stopping.wait_for(|stopping| *stopping) => {}
            () = auth::until_invalid(&control, token) => {}
        }
    }
}

/// The last lines of a service; with `follow` also those to come.
pub(crate) async fn logs(control: Rc<Control>, call: Call) -> Answer {
    const TYPE: &str = "application/x-ndjson";
    let follow = call.flag("follow", false)?;
    let all = u32::try_from(LINES_MAX).unwrap_or(u32::MAX);
    let tail = call.number("tail", all)?.unwrap_or(all);
    let service = control.service_of(&call).await?;
    let log = control.logs.borrow().service(service.id);
    let log = log.ok_or_else(|| Problem::not_found("service"))?;
    let start = log.start(tail);
    if !follow {
        let (chunk, _) = log.read(start);
        return Ok(Reply::stream(TYPE, stream::iter([chunk])));
    }
    let place = Place::take(&control)?;
    let ended = ended(&control, call.caller()?.token);
    let chunks = stream::unfold((log, start, place), |(log, from, place)| async move {
        let (chunk, next) = log.follow(from).await?;
        Some((chunk, (log, next, place)))
    });
    Ok(Reply::stream(TYPE, chunks.take_until(ended)))
}

/// Changes of state, as server-sent events.
pub(crate) async fn events(control: Rc<Control>, call: Call) -> Answer {
    let scope = call.caller()?.scope.clone();
    let place = Place::take(&control)?;
    let ended = ended(&control, call.caller()?.token);
    let receiver = control.events.subscribe();
    let hello = stream::iter([Bytes::from_static(b": listening\n\n")]);
    let chunks = stream::unfold((receiver, scope, place), |state| async move {
        let (mut receiver, scope, place) = state;
        let text = loop {
            // Each branch only waits: nothing is lost when another one ends the wait.
            tokio::select! {
                event = receiver.recv() => match event {
                    Ok(event) if event.visible_to(&scope) => break event.to_sse(),
                    Ok(_) => {}
                    Err(RecvError::Lagged(events)) => {
                        break format!("event: lost\ndata: {{\"events\":{events}}}\n\n");
                    }
                    Err(RecvError::Closed) => return None,
                },
                () = tokio::time::sleep(KEEP_ALIVE) => break ": alive\n\n".to_owned(),
            }
        };
        Some((Bytes::from(text), (receiver, scope, place)))
    });
    let chunks = hello.chain(chunks).take_until(ended);
    Ok(Reply::stream("text/event-stream", chunks).header(http::header::CACHE_CONTROL, "no-store"))
}
