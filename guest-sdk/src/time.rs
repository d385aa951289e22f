//! Waiting.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use crate::rt::Sleep;

/// Waits that long. The host may let others run meanwhile; its own deadline for
/// the request goes on.
pub async fn sleep(duration: Duration) {
    Sleep::new(duration).await;
}

/// It took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the time is over")
    }
}

impl std::error::Error for Elapsed {}

/// Runs a future for at most that long; if it is not done by then, it is dropped.
///
/// ```
/// use std::time::Duration;
/// use insula_sdk::{test, time};
///
/// test::run(async {
///     let soon = time::sleep(Duration::from_millis(1));
///     assert_eq!(time::timeout(Duration::from_secs(60), soon).await, Ok(()));
///     let never = std::future::pending::<()>();
///     assert_eq!(time::timeout(Duration::from_millis(1), never).await, Err(time::Elapsed));
/// });
/// ```
///
/// # Errors
/// [`Elapsed`].
pub async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    let mut limit = pin!(Sleep::new(limit));
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        limit.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}
