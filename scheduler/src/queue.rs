//! The jobs of a tenant: two FIFOs threaded through one host-wide slab, so
//! that an idle tenant owns no memory of its own and a job can leave from the
//! middle in O(1).
//!
//! Order inside a tenant:
//! 1. fresh and woken jobs before preempted ones (short jobs finish first, as
//!    in a two-level feedback queue: Corbató, Daggett, Daley, 1962), but after
//!    [`FRESH_RUN_MAX`] of them in a row one preempted job, so that a flood of
//!    new requests cannot hold an old one for ever; one that is continued is
//!    the first of the preempted ones, so that its turn may be longer than a
//!    slice: the levels of a feedback queue have longer turns as they go down;
//! 2. inside a class first come, first served, except that a job whose home is
//!    the asking worker is preferred among the first [`LOCAL_SCAN`], unless
//!    the oldest has been passed over [`PASSED_OVER_MAX`] times.

use crate::units::{JobId, WorkerId};

/// How far from the front a local job is looked for. A bound on the cost of a
/// pick (one cache line per job).
pub(crate) const LOCAL_SCAN: usize = 16;
/// How often the oldest job of a class may be passed over for a local one.
pub(crate) const PASSED_OVER_MAX: u16 = 16;
/// How many fresh jobs may run in a row while a preempted one waits.
pub(crate) const FRESH_RUN_MAX: u16 = 32;

const NONE: u32 = u32::MAX;

/// Which of a tenant's queues a job stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Fresh,
    Preempted,
    /// First of the preempted ones.
    Continued,
    /// First in line.
    Paused,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    job: JobId,
    home: WorkerId,
    prev: u32,
    next: u32,
}

/// All queued jobs of all tenants.
#[derive(Clone, Debug)]
pub(crate) struct JobSlab {
    nodes: Vec<Node>,
    /// Head of the list of unused nodes, through `next`.
    free: u32,
}

impl JobSlab {
    pub(crate) const fn new() -> Self {
        Self {
            nodes: Vec::new(),
            free: NONE,
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "Config::queued_max and the workers together stay below 2^32"
    )]
    fn alloc(&mut self, node: Node) -> u32 {
        if self.free == NONE {
            self.nodes.push(node);
            return (self.nodes.len() - 1) as u32;
        }
        let at = self.free;
        self.free = self.nodes[at as usize].next;
        self.nodes[at as usize] = node;
        at
    }

    fn release(&mut self, at: u32) {
        self.nodes[at as usize].next = self.free;
        self.free = at;
    }
}

#[derive(Clone, Copy, Debug)]
struct Fifo {
    head: u32,
    tail: u32,
    passed_over: u16,
}

impl Fifo {
    const fn new() -> Self {
        Self {
            head: NONE,
            tail: NONE,
            passed_over: 0,
        }
    }

    fn push(&mut self, slab: &mut JobSlab, job: JobId, home: WorkerId) {
        let at = slab.alloc(Node {
            job,
            home,
            prev: self.tail,
            next: NONE,
        });
        match self.tail {
            NONE => self.head = at,
            tail => slab.nodes[tail as usize].next = at,
        }
        self.tail = at;
    }

    fn push_front(&mut self, slab: &mut JobSlab, job: JobId, home: WorkerId) {
        let at = slab.alloc(Node {
            job,
            home,
            prev: NONE,
            next: self.head,
        });
        match self.head {
            NONE => self.tail = at,
            head => slab.nodes[head as usize].prev = at,
        }
        self.head = at;
    }

    fn unlink(&mut self, slab: &mut JobSlab, at: u32) -> Node {
        let node = slab.nodes[at as usize];
        match node.prev {
            NONE => {
                self.head = node.next;
                self.passed_over = 0;
            }
            prev => slab.nodes[prev as usize].next = node.next,
        }
        match node.next {
            NONE => self.tail = node.prev,
            next => slab.nodes[next as usize].prev = node.prev,
        }
        slab.release(at);
        node
    }

    fn take(&mut self, slab: &mut JobSlab, worker: WorkerId) -> Option<(JobId, WorkerId)> {
        if self.head == NONE {
            return None;
        }
        let at = self.local_or_oldest(slab, worker);
        if at != self.head {
            self.passed_over += 1;
        }
        let node = self.unlink(slab, at);
        Some((node.job, node.home))
    }

    fn local_or_oldest(&self, slab: &JobSlab, worker: WorkerId) -> u32 {
        if self.passed_over >= PASSED_OVER_MAX {
            return self.head;
        }
        let mut at = self.head;
        for _ in 0..LOCAL_SCAN {
            if at == NONE {
                break;
            }
            let node = &slab.nodes[at as usize];
            if node.home == worker {
                return at;
            }
            at = node.next;
        }
        self.head
    }

    fn find(&self, slab: &JobSlab, job: JobId) -> Option<u32> {
        let mut at = self.head;
        while at != NONE {
            let node = &slab.nodes[at as usize];
            if node.job == job {
                return Some(at);
            }
            at = node.next;
        }
        None
    }
}

/// One tenant's queued jobs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JobQueue {
    fresh: Fifo,
    preempted: Fifo,
    paused: Fifo,
    len: u32,
    fresh_run: u16,
}

impl JobQueue {
    pub(crate) const fn new() -> Self {
        Self {
            fresh: Fifo::new(),
            preempted: Fifo::new(),
            paused: Fifo::new(),
            len: 0,
            fresh_run: 0,
        }
    }

    pub(crate) const fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn push(&mut self, slab: &mut JobSlab, job: JobId, home: WorkerId, lane: Lane) {
        match lane {
            Lane::Fresh => self.fresh.push(slab, job, home),
            Lane::Preempted => self.preempted.push(slab, job, home),
            Lane::Continued => self.preempted.push_front(slab, job, home),
            Lane::Paused => self.paused.push(slab, job, home),
        }
        self.len += 1;
    }

    /// The next job for `worker`, with its home.
    pub(crate) fn take(
        &mut self,
        slab: &mut JobSlab,
        worker: WorkerId,
    ) -> Option<(JobId, WorkerId)> {
        if let Some(taken) = self.paused.take(slab, worker) {
            self.len -= 1;
            return Some(taken);
        }
        let fresh_waits = self.fresh.head != NONE;
        let preempted_waits = self.preempted.head != NONE;
        let preempted_first = preempted_waits && self.fresh_run >= FRESH_RUN_MAX;
        let taken = if fresh_waits && !preempted_first {
            self.fresh_run = if preempted_waits {
                self.fresh_run + 1
            } else {
                0
            };
            self.fresh.take(slab, worker)
        } else {
            self.fresh_run = 0;
            self.preempted.take(slab, worker)
        };
        self.len -= u32::from(taken.is_some());
        taken
    }

    /// Removes `job`; O(jobs queued by this tenant). Says whether it was there.
    pub(crate) fn cancel(&mut self, slab: &mut JobSlab, job: JobId) -> bool {
        for fifo in [&mut self.fresh, &mut self.preempted, &mut self.paused] {
            if let Some(at) = fifo.find(slab, job) {
                fifo.unlink(slab, at);
                self.len -= 1;
                return true;
            }
        }
        false
    }

    /// Empties the queue, oldest first, fresh before preempted before paused.
    pub(crate) fn drain(&mut self, slab: &mut JobSlab) -> Vec<JobId> {
        let mut jobs = Vec::with_capacity(self.len as usize);
        for fifo in [&mut self.fresh, &mut self.preempted, &mut self.paused] {
            while fifo.head != NONE {
                jobs.push(fifo.unlink(slab, fifo.head).job);
            }
        }
        self.len = 0;
        jobs
    }
}
