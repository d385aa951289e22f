//! `Idempotency-Key`: a POST that is repeated with the same key and the same body is answered as
//! before, for a day, instead of done again.
//!
//! The answer is stored in the transaction of the change itself: after a crash there are both or
//! neither.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;

use http::StatusCode;
use http::header::HeaderName;

use super::Control;
use super::changes::Remember;
use super::http_types::{Call, Reply};
use super::problem::{Code, Problem};
use crate::state::Timestamp;

/// Longest key.
const KEY_MAX_BYTES: usize = 255;

/// Keys whose requests are being worked on.
pub(crate) type InProgress = RefCell<HashSet<[u8; 32]>>;

/// A request with a key, while it is worked on.
pub(crate) struct Keyed {
    control: Rc<Control>,
    key: [u8; 32],
}

impl Drop for Keyed {
    fn drop(&mut self) {
        self.control.in_progress.borrow_mut().remove(&self.key);
    }
}

/// Takes note of the key, if there is one.
pub(crate) fn begin(control: &Rc<Control>, call: &Call) -> Result<Option<Keyed>, Problem> {
    let Some(value) = call.headers.get("idempotency-key") else {
        return Ok(None);
    };
    let value = value.as_bytes();
    if value.is_empty() || value.len() > KEY_MAX_BYTES {
        let detail = format!("an Idempotency-Key has 1 to {KEY_MAX_BYTES} bytes");
        return Err(Problem::new(Code::BadRequest, detail));
    }
    let token = call.caller()?.token;
    let scope = format!("{token}\0{} {}\0{:?}\0", call.method, call.path, call.query);
    let key = super::sha256(&[scope.as_bytes(), value].concat());
    if !control.in_progress.borrow_mut().insert(key) {
        let detail = "a request with this Idempotency-Key is being worked on";
        return Err(Problem::new(Code::InProgress, detail).retry_after(1));
    }
    Ok(Some(Keyed {
        control: Rc::clone(control),
        key,
    }))
}

impl Keyed {
    /// The answer given before, if the same request was answered.
    pub(crate) async fn replay(&self, body: [u8; 32]) -> Result<Option<Reply>, Problem> {
        let key = self.key;
        let found = self
            .control
            .store(move |store| store.remembered(&key, Timestamp::now()))
            .await?;
        match found {
            None => Ok(None),
            Some(answer) if answer.body != body => Err(Problem::new(
                Code::IdempotencyMismatch,
                "this Idempotency-Key came with another body before",
            )),
            Some(answer) => {
                let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
                let reply = Reply::json_text(status, answer.answer);
                Ok(Some(reply.header(
                    HeaderName::from_static("idempotency-replayed"),
                    "true",
                )))
            }
        }
    }

    /// For the change that the request asks for: its answer is stored in the same transaction.
    pub(crate) const fn remember(&self, body: [u8; 32]) -> Remember {
        Remember {
            key: self.key,
            body,
        }
    }
}
