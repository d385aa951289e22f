//! Uploads: received under a temporary name, bounded in length and time.

use std::time::Duration;

use super::Control;
use super::http_types::{Call, next_chunk, too_large};
use super::problem::{Code, Problem};
use crate::state::blobs::Unplaced;

/// Receives a call's body, of at most `max` bytes and within `total`. What is dropped before it was
/// placed leaves nothing.
pub(crate) async fn receive(
    control: &Control,
    call: &mut Call,
    max: u64,
    total: Duration,
) -> Result<Unplaced, Problem> {
    call.expect_length(max)?;
    let receiving = async {
        let mut file = control.files.run(|files| files.create()).await??;
        while let Some(chunk) = next_chunk(&mut call.body).await? {
            if file.size_bytes() + chunk.len() as u64 > max {
                return Err(too_large(max));
            }
            let written = control
                .files
                .run(move |_| file.write(&chunk).map(|()| file))
                .await?;
            file = written?;
        }
        Ok(file)
    };
    let late = |_| Problem::new(Code::BodyTimeout, "the upload took too long");
    tokio::time::timeout(total, receiving).await.map_err(late)?
}
