//! A client's socket: it wakes its worker, or [rests](crate::pool::resting).

use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::billing;
use crate::pool::resting::Resting;

/// A socket for one task, on one worker.
#[derive(Debug)]
pub(super) enum Socket {
    Live(TcpStream),
    Resting(Resting),
    /// It was lost on its way between the two.
    Lost,
}

impl Socket {
    fn rest(&mut self) -> io::Result<()> {
        if let Self::Live(stream) = std::mem::replace(self, Self::Lost) {
            *self = Self::Resting(Resting::new(stream.into_std()?)?);
        }
        Ok(())
    }

    fn live(&mut self) -> io::Result<()> {
        if let Self::Resting(resting) = std::mem::replace(self, Self::Lost) {
            *self = Self::Live(TcpStream::from_std(resting.leave()?)?);
        }
        Ok(())
    }
}

/// What a system call on a resting socket came to.
fn ended<T>(result: io::Result<T>, resting: &Resting, cx: &Context<'_>) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            resting.wait(cx.waker());
            Poll::Pending
        }
        result => Poll::Ready(result),
    }
}

/// Tries until a signal does not come between.
fn whole<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = match this {
            Self::Live(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Resting(resting) => {
                let into = buffer.initialize_unfilled();
                ended(whole(|| (&resting.socket).read(into)), resting, cx)
                    .map_ok(|count| buffer.advance(count))
            }
            Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        };
        if polled.is_ready() {
            return polled;
        }
        // There is nothing to read: now is the time to change.
        match (&this, billing::is_refused()) {
            (Self::Live(_), true) => {
                this.rest()?;
                if let Self::Resting(resting) = this {
                    resting.wait(cx.waker());
                }
                Poll::Pending
            }
            (Self::Resting(_), false) => {
                this.live()?;
                match this {
                    Self::Live(stream) => Pin::new(stream).poll_read(cx, buffer),
                    _ => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }
            _ => Poll::Pending,
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Live(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Resting(resting) => ended(whole(|| (&resting.socket).write(bytes)), resting, cx),
            Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Live(stream) => Pin::new(stream).poll_write_vectored(cx, pieces),
            Self::Resting(resting) => {
                let written = whole(|| (&resting.socket).write_vectored(pieces));
                ended(written, resting, cx)
            }
            Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The kernel has what was written.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Live(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Resting(resting) => Poll::Ready(resting.socket.shutdown(Shutdown::Write)),
            Self::Lost => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::time::sleep;

    use super::*;
    use crate::pool::resting;

    /// Looks all the time, as a worker does in its batches.
    async fn look() {
        loop {
            resting::look(Instant::now());
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// A client, and its socket.
    async fn pair() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await;
        let (stream, _) = listener.accept().await.unwrap();
        (client.unwrap(), Socket::Live(stream))
    }

    #[tokio::test]
    async fn a_socket_at_rest_carries_the_same_bytes() {
        let (client, mut socket) = pair().await;
        socket.rest().unwrap();
        // More than the kernel takes at once.
        let sent: Vec<u8> = (0..=255).flat_map(|byte| [byte; 32 << 10]).collect();
        let expected = sent.clone();
        let talk = async {
            let (mut from, mut to) = client.into_split();
            let both = tokio::join!(
                async {
                    to.write_all(&sent).await.unwrap();
                    to.shutdown().await.unwrap();
                },
                async {
                    let mut back = Vec::new();
                    from.read_to_end(&mut back).await.unwrap();
                    back
                }
            );
            both.1
        };
        let echo = async {
            let mut buffer = vec![0; 100_000];
            loop {
                // As nobody was refused anything, a wait makes it live again.
                if matches!(socket, Socket::Live(_)) {
                    socket.rest().unwrap();
                }
                let count = socket.read(&mut buffer).await.unwrap();
                if count == 0 {
                    break;
                }
                socket.write_all(&buffer[..count]).await.unwrap();
            }
            socket.flush().await.unwrap();
            socket.shutdown().await.unwrap();
        };
        let both = async { tokio::join!(talk, echo).0 };
        tokio::select! {
            back = both => assert!(back == expected),
            () = look() => {}
            () = sleep(Duration::from_secs(30)) => panic!("it stands still"),
        }
    }

    #[tokio::test]
    async fn it_is_live_again_when_nothing_was_refused() {
        let (mut client, mut socket) = pair().await;
        socket.rest().unwrap();
        client.write_all(b"a").await.unwrap();
        let mut byte = [0];
        socket.read_exact(&mut byte).await.unwrap();
        let waits = async {
            socket.read_exact(&mut byte).await.unwrap();
        };
        let asks = async {
            sleep(Duration::from_millis(10)).await;
            client.write_all(b"b").await.unwrap();
        };
        // Nobody looks.
        tokio::join!(waits, asks);
        assert!(matches!(socket, Socket::Live(_)));
        drop(client);
        socket.rest().unwrap();
        assert_eq!(socket.read(&mut byte).await.unwrap(), 0, "the end");
    }
}
