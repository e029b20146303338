//! Threads that wait for pieces of work.
//!
//! A run of a model has hundreds of short loops, one after the other. Waking sleeping threads for each costs more than
//! most of the loops, so threads that have just worked look out for the next loop for a while before they sleep.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread without work stays awake.
const AWAKE: Duration = Duration::from_micros(300);
/// Looks at the job between looks at the clock.
const LOOKS: u32 = 128;
/// Pieces of a loop, at most; several are done as one where there are more.
const PIECES: usize = u16::MAX as usize;

type Piece<'a> = dyn Fn(usize) + Sync + 'a;

/// What all threads see.
///
/// Every thread has a range of neighbouring pieces, which it does in order, so that it reads one sequence of memory;
/// who is done takes the last pieces of others. A [`Range`] is changed by compare-and-swap and holds the loop's number,
/// so a thread that read the body of an older loop cannot take a piece of a newer one.
struct Shared {
    ranges: Vec<Line<AtomicU64>>,
    /// The loop's body: a pointer to a `&Piece` of the caller's stack.
    body: AtomicPtr<&'static Piece<'static>>,
    open: Line<AtomicUsize>,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

/// Something that shares its cache lines with nothing else.
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

/// Pieces that nobody has taken yet: the number of the loop, the first piece, the one behind the last.
#[derive(Clone, Copy)]
struct Range {
    turn: u32,
    first: u16,
    end: u16,
}

impl Range {
    const fn to_bits(self) -> u64 {
        (self.turn as u64) << 32 | (self.first as u64) << 16 | self.end as u64
    }

    const fn from_bits(bits: u64) -> Self {
        Self {
            turn: (bits >> 32) as u32,
            first: (bits >> 16) as u16,
            end: bits as u16,
        }
    }
}

/// A number of threads, the caller's included. Work is cut by its size alone, never by their number.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
    /// Held by the caller whose loop runs; others do theirs alone.
    turn: Mutex<()>,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Pool>>> = const { RefCell::new(None) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// `threads` threads, of which one is whoever calls.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Arc<Self>> {
        let others = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            ranges: (0..=others).map(|_| Line::default()).collect(),
            body: AtomicPtr::new(std::ptr::null_mut()),
            open: Line::default(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleeping: (0..others).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
            handles: Vec::new(),
            turn: Mutex::new(()),
        };
        for i in 0..others {
            let shared = pool.shared.clone();
            let builder = thread::Builder::new().name(format!("olive-{}", i + 1));
            let handle = builder.spawn(move || work(&shared, i + 1))?;
            pool.threads.push(handle.thread().clone());
            pool.handles.push(handle);
        }
        Ok(Arc::new(pool))
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Lets the loops of `work` use this pool.
    pub fn install<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        struct Restore(Option<Arc<Pool>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                let before = self.0.take();
                CURRENT.with(|current| *current.borrow_mut() = before);
            }
        }
        let before = CURRENT.with(|current| current.borrow_mut().replace(self.clone()));
        let _restore = Restore(before);
        work()
    }

    /// Calls `body` with every number below `pieces`, on all threads.
    fn run(&self, pieces: usize, body: &Piece<'_>) {
        let alone = || (0..pieces).for_each(body);
        if self.threads.is_empty() || pieces < 2 || BUSY.with(Cell::get) {
            return alone();
        }
        if pieces > PIECES {
            let some = pieces.div_ceil(PIECES);
            let body = |i: usize| (i * some..((i + 1) * some).min(pieces)).for_each(body);
            return self.run(pieces.div_ceil(some), &body);
        }
        let Ok(_turn) = self.turn.try_lock() else {
            return alone();
        };
        let shared = &*self.shared;
        // SAFETY: the lifetime is put aside only while this call lasts: it returns after the last piece is done, and
        // no thread touches the body without having taken a piece.
        let body: &'static Piece<'static> = unsafe { std::mem::transmute::<&Piece<'_>, _>(body) };
        let place = &raw const body;
        // All ranges are empty since the end of the last loop: nobody takes a piece while the fields change.
        shared.body.store(place.cast_mut(), Ordering::Release);
        shared.open.0.store(pieces, Ordering::Release);
        let turn = Range::from_bits(shared.ranges[0].0.load(Ordering::Relaxed)).turn;
        let count = shared.ranges.len();
        for (i, range) in shared.ranges.iter().enumerate() {
            let range_of = Range {
                turn: turn.wrapping_add(1),
                first: (pieces * i / count) as u16,
                end: (pieces * (i + 1) / count) as u16,
            };
            range.0.store(range_of.to_bits(), Ordering::SeqCst);
        }
        for (thread, sleeping) in self.threads.iter().zip(&shared.sleeping) {
            if sleeping.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        shared.take_pieces(0);
        let mut looks = 0u32;
        while shared.open.0.load(Ordering::Acquire) > 0 {
            looks += 1;
            if looks < 1 << 14 {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a piece of a parallel loop failed"));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            thread.unpark();
        }
        for handle in self.handles.drain(..) {
            // A worker catches what its pieces throw.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// Does pieces of the loop that is open until none is left: those of thread `index`, then those of others.
    fn take_pieces(&self, index: usize) {
        let count = self.ranges.len();
        for i in 0..count {
            let range = &self.ranges[(index + i) % count].0;
            while self.take_piece(range, i == 0) {}
        }
    }

    /// Does the first piece of a range, or the last one; `false` if there is none.
    fn take_piece(&self, range: &AtomicU64, from_front: bool) -> bool {
        let bits = range.load(Ordering::SeqCst);
        let mut left = Range::from_bits(bits);
        if left.first >= left.end {
            return false;
        }
        let body = self.body.load(Ordering::Acquire);
        let piece = if from_front {
            left.first += 1;
            left.first - 1
        } else {
            left.end -= 1;
            left.end
        };
        let taken = range.compare_exchange(bits, left.to_bits(), Ordering::SeqCst, Ordering::Relaxed);
        if taken.is_err() {
            return true;
        }
        BUSY.with(|busy| busy.set(true));
        // SAFETY: the exchange succeeded, so the loop that `piece` belongs to is still open and `body` is its body: a
        // newer loop would have changed the range. Its caller waits for this piece.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*body)(usize::from(piece)) }));
        BUSY.with(|busy| busy.set(false));
        if result.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.open.0.fetch_sub(1, Ordering::Release);
        true
    }

    fn has_piece(&self) -> bool {
        self.ranges.iter().any(|range| {
            let range = Range::from_bits(range.0.load(Ordering::SeqCst));
            range.first < range.end
        })
    }
}

/// What thread `index` does; 0 is whoever calls [`Pool::run`].
fn work(shared: &Shared, index: usize) {
    let mut since = Instant::now();
    let mut looks = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.has_piece() {
            shared.take_pieces(index);
            (since, looks) = (Instant::now(), 0);
            continue;
        }
        looks += 1;
        if looks < LOOKS {
            std::hint::spin_loop();
            continue;
        }
        looks = 0;
        if since.elapsed() < AWAKE {
            continue;
        }
        shared.sleeping[index - 1].store(true, Ordering::SeqCst);
        // A loop that was opened before the flag was up did not wake this thread.
        if !shared.has_piece() && !shared.stop.load(Ordering::SeqCst) {
            thread::park();
        }
        shared.sleeping[index - 1].store(false, Ordering::SeqCst);
        since = Instant::now();
    }
}

/// Calls `body` with every number below `pieces` on the threads of [`Pool::install`], or on as many as rayon has.
pub fn for_each(pieces: usize, body: impl Fn(usize) + Sync) {
    if pieces < 2 {
        return (0..pieces).for_each(body);
    }
    let current = CURRENT.with(|current| current.borrow().clone());
    match current.as_ref().or_else(|| everyone().as_ref()) {
        Some(pool) => pool.run(pieces, &body),
        None => (0..pieces).for_each(body),
    }
}

/// The pool of callers that have none.
fn everyone() -> &'static Option<Arc<Pool>> {
    static POOL: OnceLock<Option<Arc<Pool>>> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(rayon::current_num_threads()).ok())
}

/// A pool of `threads`, shared by all who ask for as many: models that are opened one after the other do not gather
/// threads.
///
/// # Errors
/// As [`Pool::new`].
pub fn shared(threads: usize) -> std::io::Result<Arc<Pool>> {
    static POOLS: Mutex<Vec<std::sync::Weak<Pool>>> = Mutex::new(Vec::new());
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.retain(|pool| pool.strong_count() > 0);
    let found = pools.iter().filter_map(std::sync::Weak::upgrade);
    if let Some(pool) = found.into_iter().find(|pool| pool.threads() == threads.max(1)) {
        return Ok(pool);
    }
    let pool = Pool::new(threads)?;
    pools.push(Arc::downgrade(&pool));
    Ok(pool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_and_before_the_loop_returns() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            pool.install(|| {
                for round in 0..2000 {
                    let pieces = if round == 7 { 2 * PIECES + 5 } else { round % 17 };
                    let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                    for_each(pieces, |i| {
                        done[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        done.iter().all(|n| n.load(Ordering::Relaxed) == 1),
                        "{threads} {round}"
                    );
                    if round % 500 == 0 {
                        thread::sleep(2 * AWAKE);
                    }
                }
            });
        }
    }

    #[test]
    fn loops_in_loops_and_of_several_callers_come_to_an_end() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.install(|| {
                        for _ in 0..200 {
                            for_each(5, |_| {
                                for_each(3, |_| {
                                    total.fetch_add(1, Ordering::Relaxed);
                                })
                            });
                        }
                    });
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 15);
    }

    #[test]
    fn a_failing_piece_fails_the_loop_and_leaves_the_pool_usable() {
        let pool = Pool::new(2).unwrap();
        pool.install(|| {
            let failed = catch_unwind(|| for_each(8, |i| assert_ne!(i, 5)));
            assert!(failed.is_err());
            let sum = AtomicUsize::new(0);
            for_each(8, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 28);
        });
    }

    #[test]
    fn pools_of_one_size_are_shared_while_somebody_holds_them() {
        let pool = shared(3).unwrap();
        assert!(Arc::ptr_eq(&pool, &shared(3).unwrap()));
        assert_eq!(shared(0).unwrap().threads(), 1);
    }
}
