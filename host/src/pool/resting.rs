//! Connections of tenants that ask for more than they may have.
//!
//! Whatever arrives on a connection wakes its worker at once. Where what arrives is refused, that costs
//! more than the refusal: the worker takes the core back from a guest, perhaps of another tenant, and
//! gives it again. So the connections of a tenant of which something was refused lately are in a set of
//! their own, at which the worker looks every [`LOOK`]: they wake nobody, and what was asked on them
//! meanwhile is done together.
//!
//! ```text
//!  live: wakes its worker ──▶ nothing to read, and its tenant was refused something ──▶ rests
//!            ▲                                                                            │ looked at
//!            └── nothing to read, and nothing was refused for [`MEMORY`] ◀────────────────┘
//! ```
//!
//! All of it is a worker's own. On failure: a socket that cannot be put into the set is lost, as one
//! whose worker has no descriptors for it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::task::Waker;
use std::time::{Duration, Instant};

use insula_types::TenantId;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// How often they are looked at: a refusal is to be heard of within 5 ms.
const LOOK: Duration = Duration::from_millis(2);
/// For how long a tenant's connections rest after something of it was refused.
const MEMORY: Duration = Duration::from_millis(100);
/// Events that are taken at once.
const EVENTS: usize = 256;

thread_local! {
    static SET: RefCell<Set> = RefCell::default();
}

/// The set of one worker.
#[derive(Default)]
struct Set {
    /// Made when the first connection comes.
    epoll: Option<OwnedFd>,
    /// Whom to wake, by number of the connection.
    wakers: BTreeMap<u64, Option<Waker>>,
    next_number: u64,
    /// Tenants of which something was refused lately, and when it was last.
    refused: Vec<(TenantId, Instant)>,
    /// When the set is looked at again.
    next_look: Option<Instant>,
}

/// Something of this tenant was refused, since it asks for more than it may have.
pub(crate) fn refused(tenant: TenantId) {
    SET.with_borrow_mut(|set| {
        let now = Instant::now();
        match set.refused.iter_mut().find(|(whose, _)| *whose == tenant) {
            Some((_, at)) => *at = now,
            None => set.refused.push((tenant, now)),
        }
        set.next_look.get_or_insert(now + LOOK);
    });
}

/// Whether the connections of this tenant are to rest when there is nothing to read.
pub(crate) fn is_refused(tenant: TenantId) -> bool {
    SET.with_borrow(|set| set.refused.iter().any(|(whose, _)| *whose == tenant))
}

/// Looks at the set where it is time for that, and wakes those who can go on. Says how many.
pub(crate) fn look(now: Instant) -> usize {
    let wakers = SET.with_borrow_mut(|set| set.look(now));
    let woken = wakers.len();
    wakers.into_iter().for_each(Waker::wake);
    woken
}

/// When to look again, while there is a set.
pub(super) fn next_look() -> Option<Instant> {
    SET.with_borrow(|set| set.next_look)
}

impl Set {
    fn look(&mut self, now: Instant) -> Vec<Waker> {
        if self.next_look.is_none_or(|at| now < at) {
            return Vec::new();
        }
        let known = self.refused.len();
        self.refused
            .retain(|(_, at)| now.saturating_duration_since(*at) < MEMORY);
        let mut woken = Vec::new();
        if self.refused.len() < known {
            // Those of whom it is forgotten find that out for themselves.
            woken.extend(self.wakers.values_mut().filter_map(Option::take));
        }
        self.take_ready(&mut woken);
        let needed = !self.refused.is_empty() || !self.wakers.is_empty();
        self.next_look = needed.then(|| now + LOOK);
        woken
    }

    fn take_ready(&mut self, woken: &mut Vec<Waker>) {
        let Some(epoll) = &self.epoll else { return };
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            let taken = epoll::wait(epoll, spare_capacity(&mut events), Some(&at_once));
            for event in &events {
                let number = event.data.u64();
                woken.extend(self.wakers.get_mut(&number).and_then(Option::take));
            }
            if taken.unwrap_or(0) < EVENTS {
                return;
            }
        }
    }

    fn add(&mut self, socket: &TcpStream) -> io::Result<u64> {
        let epoll = match &self.epoll {
            Some(epoll) => epoll,
            None => self
                .epoll
                .insert(epoll::create(epoll::CreateFlags::CLOEXEC)?),
        };
        let number = self.next_number;
        // What is there already is an event as well.
        let what = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        epoll::add(epoll, socket, epoll::EventData::new_u64(number), what)?;
        self.next_number += 1;
        self.wakers.insert(number, None);
        self.next_look.get_or_insert_with(|| Instant::now() + LOOK);
        Ok(number)
    }
}

/// A socket that rests. It belongs to the thread that made it.
#[derive(Debug)]
pub(crate) struct Resting {
    /// Closing it takes it out of the kernel's set.
    pub(crate) socket: TcpStream,
    place: Place,
}

/// A number in the set.
#[derive(Debug)]
struct Place(u64);

impl Drop for Place {
    fn drop(&mut self) {
        // At the end of a thread the set may have gone before.
        let _ = SET.try_with(|set| set.borrow_mut().wakers.remove(&self.0));
    }
}

impl Resting {
    /// Puts a socket into the set; it does not block.
    ///
    /// # Errors
    /// As of `epoll_ctl(2)`.
    pub(crate) fn new(socket: TcpStream) -> io::Result<Self> {
        let number = SET.with_borrow_mut(|set| set.add(&socket))?;
        let place = Place(number);
        Ok(Self { socket, place })
    }

    /// Wakes a task when the set is looked at and the socket can be read, or written to.
    pub(crate) fn wait(&self, waker: &Waker) {
        SET.with_borrow_mut(|set| {
            if let Some(known) = set.wakers.get_mut(&self.place.0) {
                *known = Some(waker.clone());
            }
        });
    }

    /// Takes the socket out of the set.
    ///
    /// # Errors
    /// As of `epoll_ctl(2)`.
    pub(crate) fn leave(self) -> io::Result<TcpStream> {
        SET.with_borrow(|set| match &set.epoll {
            Some(epoll) => epoll::delete(epoll, &self.socket),
            None => Ok(()),
        })?;
        Ok(self.socket)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A client, and its socket at rest.
    fn resting() -> (TcpStream, Resting) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        (client, Resting::new(socket).unwrap())
    }

    #[test]
    fn who_rests_is_woken_when_it_is_time_to_look() {
        let (mut client, resting) = resting();
        let start = Instant::now();
        let woken = Arc::new(Woken::default());
        resting.wait(&Arc::clone(&woken).into());
        assert_eq!(look(start + 2 * LOOK), 1, "it can be written to");
        resting.wait(&Arc::clone(&woken).into());
        assert_eq!(look(start + 4 * LOOK), 0, "that was said");
        client.write_all(b"more").unwrap();
        assert_eq!(look(start + 4 * LOOK), 0, "it is not yet time");
        assert_eq!(look(next_look().unwrap()), 1);
        assert_eq!(woken.0.load(Ordering::Relaxed), 2);
        drop(resting);
        assert_eq!(look(start + 60 * LOOK), 0);
        assert_eq!(next_look(), None, "nobody is left");
    }

    #[test]
    fn a_tenant_is_forgotten_when_nothing_of_it_was_refused_for_a_while() {
        let (one, two) = (TenantId::new(1), TenantId::new(2));
        refused(one);
        assert!(is_refused(one) && !is_refused(two));
        let (_client, resting) = resting();
        let woken = Arc::new(Woken::default());
        assert_eq!(look(Instant::now() + LOOK), 0);
        resting.wait(&Arc::clone(&woken).into());
        let later = Instant::now() + MEMORY;
        assert_eq!(look(later), 1, "all look again whether they rest");
        assert!(!is_refused(one));
        let socket = resting.leave().unwrap();
        assert_eq!(look(later + LOOK), 0);
        assert_eq!(next_look(), None);
        drop(socket);
    }

    #[test]
    fn more_than_fit_at_once_are_all_woken() {
        let all: Vec<_> = (0..EVENTS + 10).map(|_| resting()).collect();
        let woken = Arc::new(Woken::default());
        for (_, resting) in &all {
            resting.wait(&Arc::clone(&woken).into());
        }
        assert_eq!(look(Instant::now() + LOOK), all.len());
    }
}
