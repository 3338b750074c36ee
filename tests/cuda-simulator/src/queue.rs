//! Queues of work ("streams"), events in them, and recordings of them ("graphs").
//!
//! Nothing is done before somebody waits for it, and then no more than what was waited for: as late as a device
//! may be. Where something is missing that orders work, or that waits for it, the results show it.

use std::cell::{Cell, OnceCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::memory::MEMORY;

/// What the driver's calls return.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Code(pub(crate) u32);

impl Code {
    pub(crate) const SUCCESS: Self = Self(0);
    pub(crate) const INVALID_VALUE: Self = Self(1);
    pub(crate) const OUT_OF_MEMORY: Self = Self(2);
    pub(crate) const INVALID_PTX: Self = Self(218);
    pub(crate) const INVALID_HANDLE: Self = Self(400);
    pub(crate) const NOT_FOUND: Self = Self(500);
    pub(crate) const NOT_READY: Self = Self(600);
    pub(crate) const ILLEGAL_ADDRESS: Self = Self(700);
    pub(crate) const MISALIGNED_ADDRESS: Self = Self(716);
    pub(crate) const LAUNCH_FAILED: Self = Self(719);
    pub(crate) const CAPTURE_UNSUPPORTED: Self = Self(900);
    pub(crate) const CAPTURE_INVALIDATED: Self = Self(901);
    pub(crate) const CAPTURE_MERGE: Self = Self(902);
    pub(crate) const CAPTURE_UNMATCHED: Self = Self(903);
    pub(crate) const CAPTURE_UNJOINED: Self = Self(904);
    pub(crate) const CAPTURE_ISOLATION: Self = Self(905);
    pub(crate) const CAPTURED_EVENT: Self = Self(907);
}

/// What went wrong. It is printed when it is returned, since the driver's callers see the number only.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// Something that a device does.
pub(crate) type Work = Arc<dyn Fn() -> Result<(), Failure> + Send + Sync>;

#[derive(Clone)]
pub(crate) enum Step {
    Work(Work),
    Free(u64),
    /// Of a graph's own memory.
    Begin(u64),
    End(u64),
    Wait(Position),
    Graph(Arc<Graph>),
}

/// A place in a queue: after so many steps since the queue began.
#[derive(Clone, Copy)]
pub(crate) struct Position {
    queue: u64,
    steps: u64,
}

#[derive(Default)]
struct Queue {
    steps: VecDeque<Step>,
    done: u64,
}

/// Steps and which other ones each comes after.
pub(crate) struct Graph {
    nodes: Vec<(Step, Vec<usize>)>,
    memory: Vec<u64>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        for &address in &self.memory {
            MEMORY.release(address);
        }
    }
}

struct Capture {
    origin: u64,
    nodes: Vec<(Step, Vec<usize>)>,
    memory: Vec<u64>,
    /// What the next step of each queue comes after.
    ends: HashMap<u64, Vec<usize>>,
    is_invalid: bool,
}

#[derive(Clone)]
enum Event {
    New,
    At(Position),
    Captured { capture: u64, ends: Vec<usize> },
}

/// Everything but memory.
#[derive(Default)]
pub(crate) struct World {
    queues: HashMap<u64, Queue>,
    events: HashMap<u64, Event>,
    captures: HashMap<u64, Capture>,
    /// The capture that a queue takes part in.
    capturing: HashMap<u64, u64>,
    graphs: HashMap<u64, Arc<Graph>>,
    /// Page-locked memory of the host: first address and length.
    locked: HashMap<u64, usize>,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);

/// The world, for one thread at a time.
pub(crate) fn world() -> MutexGuard<'static, World> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that nothing has yet; above those that the driver gives a meaning.
pub(crate) fn new_handle() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x1000);
    NEXT.fetch_add(0x10, Ordering::Relaxed)
}

/// The queue behind a handle: 2 is one for each thread.
pub(crate) fn queue_of(handle: u64) -> u64 {
    thread_local! {
        static OWN: Cell<u64> = const { Cell::new(0) };
        static END: OnceCell<End> = const { OnceCell::new() };
    }
    match handle {
        0 | 1 => 1,
        2 => OWN.with(|own| {
            if own.get() == 0 {
                own.set(new_handle());
                // A thread that is ending has it no more.
                let _ = END.try_with(|end| end.set(End(own.get())));
            }
            own.get()
        }),
        other => other,
    }
}

/// The end of a thread, and of its queue.
struct End(u64);

impl Drop for End {
    fn drop(&mut self) {
        let mut world = world();
        // Memory that goes back is nothing that somebody waits for.
        let steps = world.queues.get(&self.0).map(|queue| &queue.steps);
        let left =
            steps.into_iter().flatten().filter(|step| !matches!(step, Step::Free(_))).count();
        if left > 0 {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("without a name");
            say(&format!(
                "thread {name} ended with {left} steps in its queue that nobody has waited for"
            ));
        }
        if let Err(failure) = world.drop_queue(self.0) {
            say(&failure.text);
        }
    }
}

/// To whoever reads what the program prints.
#[allow(clippy::print_stderr)]
pub(crate) fn say(text: &str) {
    eprintln!("cuda-simulator: {text}");
}

impl World {
    /// Has a queue do something later.
    pub(crate) fn push(&mut self, queue: u64, step: Step) -> Result<(), Failure> {
        match self.capture_of(queue)? {
            Some(capture) => capture.push(queue, step),
            None => self.queues.entry(queue).or_default().steps.push_back(step),
        }
        Ok(())
    }

    fn capture_of(&mut self, queue: u64) -> Result<Option<&mut Capture>, Failure> {
        let Some(id) = self.capturing.get(&queue) else { return Ok(None) };
        match self.captures.get_mut(id) {
            Some(capture) if capture.is_invalid => {
                Err(Failure::new(Code::CAPTURE_INVALIDATED, "the recording went wrong before"))
            }
            other => Ok(other),
        }
    }

    /// An error, and the recording's end, where a queue records: for what can't be recorded.
    pub(crate) fn not_while_recording(&mut self, queue: u64, what: &str) -> Result<(), Failure> {
        if let Some(capture) = self.capture_of(queue)? {
            capture.is_invalid = true;
            let text = format!("{what} can't be recorded");
            return Err(Failure::new(Code::CAPTURE_UNSUPPORTED, text));
        }
        Ok(())
    }

    /// Memory in the queue's order.
    pub(crate) fn allocate(&mut self, queue: u64, len: usize) -> Result<u64, Failure> {
        let capture = self.capture_of(queue)?;
        let address = MEMORY.allocate(len, capture.is_none());
        let address =
            address.ok_or_else(|| Failure::new(Code::OUT_OF_MEMORY, format!("{len} bytes")))?;
        if let Some(capture) = capture {
            capture.memory.push(address);
            capture.push(queue, Step::Begin(address));
        }
        Ok(address)
    }

    pub(crate) fn free(&mut self, queue: u64, address: u64) -> Result<(), Failure> {
        if let Some(capture) = self.capture_of(queue)? {
            if !capture.memory.contains(&address) {
                let text = "a recording frees what it has not allocated";
                return Err(Failure::new(Code::INVALID_VALUE, text));
            }
            capture.push(queue, Step::End(address));
            return Ok(());
        }
        self.push(queue, Step::Free(address))
    }

    /// Does what the queue was given.
    pub(crate) fn wait(&mut self, queue: u64) -> Result<(), Failure> {
        self.not_while_recording(queue, "waiting for a queue")?;
        let steps = self.end_of(queue).steps;
        self.run(Position { queue, steps })
    }

    /// Does all that there is, of all queues.
    pub(crate) fn wait_for_all(&mut self) -> Result<(), Failure> {
        let mut queues: Vec<u64> = self.queues.keys().copied().collect();
        queues.sort_unstable();
        queues.into_iter().try_for_each(|queue| {
            let steps = self.end_of(queue).steps;
            self.run(Position { queue, steps })
        })
    }

    fn end_of(&mut self, queue: u64) -> Position {
        let of = self.queues.entry(queue).or_default();
        Position { queue, steps: of.done + of.steps.len() as u64 }
    }

    fn is_done(&self, position: Position) -> bool {
        self.queues.get(&position.queue).is_none_or(|queue| queue.done >= position.steps)
    }

    fn run(&mut self, to: Position) -> Result<(), Failure> {
        while !self.is_done(to) {
            let Some(queue) = self.queues.get_mut(&to.queue) else { break };
            let Some(step) = queue.steps.pop_front() else { break };
            queue.done += 1;
            let done = match step {
                Step::Wait(position) => self.run(position),
                step => do_step(&step),
            };
            if done.is_err()
                && let Some(queue) = self.queues.get_mut(&to.queue)
            {
                // A device does no more after that; and what copies wrote to may be gone.
                queue.done += queue.steps.len() as u64;
                queue.steps.clear();
            }
            done?;
        }
        Ok(())
    }

    pub(crate) fn drop_queue(&mut self, queue: u64) -> Result<(), Failure> {
        let done = self.wait(queue);
        self.queues.remove(&queue);
        done
    }

    pub(crate) fn is_idle(&self, queue: u64) -> bool {
        self.queues.get(&queue).is_none_or(|queue| queue.steps.is_empty())
    }

    pub(crate) fn new_event(&mut self) -> u64 {
        let handle = new_handle();
        self.events.insert(handle, Event::New);
        handle
    }

    pub(crate) fn drop_event(&mut self, event: u64) -> Result<(), Failure> {
        let found = self.events.remove(&event);
        found.map(|_| ()).ok_or_else(|| Failure::new(Code::INVALID_HANDLE, "no such event"))
    }

    fn event(&self, event: u64) -> Result<Event, Failure> {
        let found = self.events.get(&event).cloned();
        found.ok_or_else(|| Failure::new(Code::INVALID_HANDLE, "no such event"))
    }

    /// Where the queue ends now.
    pub(crate) fn record(&mut self, event: u64, queue: u64) -> Result<(), Failure> {
        self.event(event)?;
        let id = self.capturing.get(&queue).copied();
        let here = match (id, self.capture_of(queue)?) {
            (Some(id), Some(capture)) => Event::Captured {
                capture: id,
                ends: capture.ends.get(&queue).cloned().unwrap_or_default(),
            },
            _ => Event::At(self.end_of(queue)),
        };
        self.events.insert(event, here);
        Ok(())
    }

    /// Has a queue go on only after what an event stands for.
    pub(crate) fn wait_in_queue(&mut self, queue: u64, event: u64) -> Result<(), Failure> {
        let recording = self.capturing.get(&queue).copied();
        match self.event(event)? {
            Event::New => Ok(()),
            Event::At(position) => {
                if let Some(capture) = self.capture_of(queue)? {
                    capture.is_invalid = true;
                    let text = "a recording waits for what is not recorded";
                    return Err(Failure::new(Code::CAPTURE_ISOLATION, text));
                }
                self.push(queue, Step::Wait(position))
            }
            Event::Captured { capture: id, ends } => {
                if recording.is_some_and(|own| own != id) {
                    return Err(Failure::new(Code::CAPTURE_MERGE, "two recordings meet"));
                }
                let Some(capture) = self.captures.get_mut(&id) else {
                    let text = "a queue waits for what was recorded";
                    return Err(Failure::new(Code::CAPTURED_EVENT, text));
                };
                capture.ends.entry(queue).or_default().extend(ends);
                self.capturing.insert(queue, id);
                Ok(())
            }
        }
    }

    pub(crate) fn wait_for_event(&mut self, event: u64) -> Result<(), Failure> {
        match self.event(event)? {
            Event::New => Ok(()),
            Event::At(position) => self.run(position),
            Event::Captured { .. } => {
                Err(Failure::new(Code::CAPTURED_EVENT, "somebody waits for what was recorded"))
            }
        }
    }

    pub(crate) fn event_is_done(&self, event: u64) -> Result<bool, Failure> {
        match self.event(event)? {
            Event::New => Ok(true),
            Event::At(position) => Ok(self.is_done(position)),
            Event::Captured { .. } => {
                Err(Failure::new(Code::CAPTURED_EVENT, "somebody asks for what was recorded"))
            }
        }
    }

    pub(crate) fn begin_capture(&mut self, queue: u64) -> Result<(), Failure> {
        if queue == 1 {
            let text = "the legacy default stream can't be recorded";
            return Err(Failure::new(Code::CAPTURE_UNSUPPORTED, text));
        }
        if self.capturing.contains_key(&queue) {
            return Err(Failure::new(Code::INVALID_VALUE, "the queue records already"));
        }
        let id = new_handle();
        let ends = HashMap::from([(queue, Vec::new())]);
        let capture = Capture {
            origin: queue,
            nodes: Vec::new(),
            memory: Vec::new(),
            ends,
            is_invalid: false,
        };
        self.captures.insert(id, capture);
        self.capturing.insert(queue, id);
        Ok(())
    }

    /// Whether a queue records, and whether that is still good.
    pub(crate) fn recording(&self, queue: u64) -> Option<bool> {
        let id = self.capturing.get(&queue)?;
        self.captures.get(id).map(|capture| !capture.is_invalid)
    }

    /// A handle of the graph.
    pub(crate) fn end_capture(&mut self, queue: u64) -> Result<u64, Failure> {
        let found = self.capturing.get(&queue).copied();
        let id = found.filter(|id| self.captures.get(id).is_some_and(|c| c.origin == queue));
        let Some(id) = id else {
            return Err(Failure::new(Code::CAPTURE_UNMATCHED, "the queue records nothing"));
        };
        self.capturing.retain(|_, of| *of != id);
        let Some(capture) = self.captures.remove(&id) else { unreachable!() };
        let graph = Graph { nodes: capture.nodes, memory: capture.memory };
        if capture.is_invalid {
            return Err(Failure::new(Code::CAPTURE_INVALIDATED, "the recording went wrong before"));
        }
        let mut joined = HashSet::new();
        let mut open = capture.ends.get(&queue).cloned().unwrap_or_default();
        while let Some(node) = open.pop() {
            if joined.insert(node) {
                open.extend(&graph.nodes[node].1);
            }
        }
        if capture.ends.values().flatten().any(|end| !joined.contains(end)) {
            let text = "what another queue recorded is not waited for";
            return Err(Failure::new(Code::CAPTURE_UNJOINED, text));
        }
        let handle = new_handle();
        self.graphs.insert(handle, Arc::new(graph));
        Ok(handle)
    }

    pub(crate) fn graph(&self, handle: u64) -> Result<Arc<Graph>, Failure> {
        let found = self.graphs.get(&handle).cloned();
        found.ok_or_else(|| Failure::new(Code::INVALID_HANDLE, "no such graph"))
    }

    pub(crate) fn add_graph(&mut self, graph: Arc<Graph>) -> u64 {
        let handle = new_handle();
        self.graphs.insert(handle, graph);
        handle
    }

    pub(crate) fn drop_graph(&mut self, handle: u64) -> Result<(), Failure> {
        let found = self.graphs.remove(&handle);
        found.map(|_| ()).ok_or_else(|| Failure::new(Code::INVALID_HANDLE, "no such graph"))
    }

    pub(crate) fn lock_host(&mut self, address: u64, len: usize) {
        self.locked.insert(address, len);
    }

    /// The length of what was locked there.
    pub(crate) fn unlock_host(&mut self, address: u64) -> Option<usize> {
        self.locked.remove(&address)
    }

    /// Whether the host's memory there is page-locked.
    pub(crate) fn is_locked(&self, address: u64) -> bool {
        self.locked.iter().any(|(&first, &len)| (first..first + len as u64).contains(&address))
    }
}

impl Capture {
    fn push(&mut self, queue: u64, step: Step) {
        let ends = self.ends.entry(queue).or_default();
        let after = std::mem::replace(ends, vec![self.nodes.len()]);
        self.nodes.push((step, after));
    }
}

fn do_step(step: &Step) -> Result<(), Failure> {
    match step {
        Step::Work(work) => work()?,
        Step::Free(address) => MEMORY.free(*address)?,
        Step::Begin(address) => MEMORY.set_live(*address, true),
        Step::End(address) => MEMORY.set_live(*address, false),
        Step::Graph(graph) => graph.run()?,
        // Of a recording these are what nodes come after.
        Step::Wait(_) => {}
    }
    Ok(())
}

impl Graph {
    /// Of what may come next, always what was recorded last.
    fn run(&self) -> Result<(), Failure> {
        // What the time before has left.
        for &address in &self.memory {
            if MEMORY.is_live(address) {
                MEMORY.set_live(address, false);
            }
        }
        let mut missing: Vec<usize> = self.nodes.iter().map(|(_, after)| after.len()).collect();
        let mut before = vec![Vec::new(); self.nodes.len()];
        for (node, (_, after)) in self.nodes.iter().enumerate() {
            for &other in after {
                before[other].push(node);
            }
        }
        let first = (0..missing.len()).filter(|&node| missing[node] == 0);
        let mut ready: std::collections::BinaryHeap<usize> = first.collect();
        while let Some(node) = ready.pop() {
            do_step(&self.nodes[node].0)?;
            for &next in &before[node] {
                missing[next] -= 1;
                if missing[next] == 0 {
                    ready.push(next);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = Arc<Mutex<Vec<u32>>>;

    /// Has a queue write a number down.
    fn push(queue: u64, log: &Log, number: u32) {
        let log = log.clone();
        let work: Work = Arc::new(move || {
            log.lock().unwrap().push(number);
            Ok(())
        });
        world().push(queue, Step::Work(work)).unwrap();
    }

    fn written(log: &Log) -> Vec<u32> {
        std::mem::take(&mut *log.lock().unwrap())
    }

    fn code<T>(result: Result<T, Failure>) -> Code {
        result.err().unwrap().code
    }

    #[test]
    fn nothing_is_done_before_somebody_waits_for_it() {
        let (queue, other, log) = (new_handle(), new_handle(), Log::default());
        push(queue, &log, 1);
        push(other, &log, 2);
        assert_eq!(written(&log), []);
        assert!(!world().is_idle(queue));
        world().wait(queue).unwrap();
        assert_eq!(written(&log), [1]);
        assert!(world().is_idle(queue));
        world().wait(other).unwrap();
        assert_eq!(written(&log), [2]);
    }

    #[test]
    fn a_queue_that_waits_for_an_event_has_done_what_came_before_it_and_no_more() {
        let (queue, other, log) = (new_handle(), new_handle(), Log::default());
        let event = world().new_event();
        // Nothing was recorded.
        world().wait_in_queue(other, event).unwrap();
        push(queue, &log, 1);
        world().record(event, queue).unwrap();
        assert!(!world().event_is_done(event).unwrap());
        push(queue, &log, 2);
        push(other, &log, 3);
        world().wait_in_queue(other, event).unwrap();
        // What waits for it knows where that is.
        world().drop_event(event).unwrap();
        push(other, &log, 4);
        world().wait(other).unwrap();
        assert_eq!(written(&log), [3, 1, 4]);
        assert_eq!(code(world().wait_for_event(event)), Code::INVALID_HANDLE);
        world().wait(queue).unwrap();
        assert_eq!(written(&log), [2]);
    }

    #[test]
    fn a_recording_keeps_the_order_that_it_was_given_and_no_other() {
        let (main, aside, log) = (new_handle(), new_handle(), Log::default());
        let split = world().new_event();
        let join = world().new_event();
        world().begin_capture(main).unwrap();
        assert_eq!(world().recording(main), Some(true));
        push(main, &log, 1);
        world().record(split, main).unwrap();
        world().wait_in_queue(aside, split).unwrap();
        push(aside, &log, 2);
        world().record(join, aside).unwrap();
        // Nothing orders this and 2; of such, the last comes first.
        push(main, &log, 3);
        world().wait_in_queue(main, join).unwrap();
        push(main, &log, 4);
        let graph = world().end_capture(main).unwrap();
        assert_eq!(world().recording(main), None);
        assert_eq!(world().recording(aside), None);
        world().wait(main).unwrap();
        assert_eq!(written(&log), []);
        let graph = world().graph(graph).unwrap();
        for _ in 0..2 {
            world().push(main, Step::Graph(graph.clone())).unwrap();
        }
        world().wait(main).unwrap();
        assert_eq!(written(&log), [1, 3, 2, 4, 1, 3, 2, 4]);
    }

    #[test]
    fn what_a_recording_may_not_do_is_refused() {
        let (main, aside, log) = (new_handle(), new_handle(), Log::default());
        let event = world().new_event();
        // Waiting for it ends it.
        world().begin_capture(main).unwrap();
        assert_eq!(code(world().wait(main)), Code::CAPTURE_UNSUPPORTED);
        assert_eq!(world().recording(main), Some(false));
        assert_eq!(code(world().end_capture(main)), Code::CAPTURE_INVALIDATED);
        // It waits for what it does not have.
        world().record(event, aside).unwrap();
        world().begin_capture(main).unwrap();
        assert_eq!(code(world().wait_in_queue(main, event)), Code::CAPTURE_ISOLATION);
        assert_eq!(code(world().end_capture(main)), Code::CAPTURE_INVALIDATED);
        // Another queue's work is not waited for.
        world().begin_capture(main).unwrap();
        world().record(event, main).unwrap();
        world().wait_in_queue(aside, event).unwrap();
        push(aside, &log, 1);
        assert_eq!(code(world().wait_for_event(event)), Code::CAPTURED_EVENT);
        assert_eq!(code(world().end_capture(aside)), Code::CAPTURE_UNMATCHED);
        assert_eq!(code(world().end_capture(main)), Code::CAPTURE_UNJOINED);
        // Memory that was there before.
        let address = world().allocate(main, 4).unwrap();
        world().begin_capture(main).unwrap();
        assert_eq!(code(world().free(main, address)), Code::INVALID_VALUE);
        world().end_capture(main).unwrap();
        world().free(main, address).unwrap();
        world().wait(main).unwrap();
    }

    #[test]
    fn memory_is_there_from_its_allocation_to_its_release_and_no_longer() {
        let queue = new_handle();
        let address = world().allocate(queue, 10).unwrap();
        MEMORY.check(address, 10, "all of it").unwrap();
        assert_eq!(code(MEMORY.check(address + 1, 10, "one more")), Code::ILLEGAL_ADDRESS);
        assert_eq!(code(MEMORY.check(address - 1, 1, "one before")), Code::ILLEGAL_ADDRESS);
        assert_eq!(code(MEMORY.slice::<u32>(address + 2, 1, "x")), Code::MISALIGNED_ADDRESS);
        assert_eq!(MEMORY.slice::<u16>(address, 1, "x").unwrap(), [0xffff]);
        world().free(queue, address).unwrap();
        MEMORY.check(address, 10, "as long as nobody waits").unwrap();
        world().wait(queue).unwrap();
        assert_eq!(code(MEMORY.check(address, 1, "x")), Code::ILLEGAL_ADDRESS);
        world().free(queue, address).unwrap();
        assert_eq!(code(world().wait(queue)), Code::INVALID_VALUE);
    }

    #[test]
    fn a_graphs_memory_lives_while_it_runs() {
        let queue = new_handle();
        world().begin_capture(queue).unwrap();
        let address = world().allocate(queue, 4).unwrap();
        let kept = world().allocate(queue, 4).unwrap();
        let work: Work = Arc::new(move || {
            MEMORY.slice_mut::<u32>(address, 1, "x")?[0] = 7;
            MEMORY.slice_mut::<u32>(kept, 1, "x")?[0] = 8;
            Ok(())
        });
        world().push(queue, Step::Work(work)).unwrap();
        world().free(queue, address).unwrap();
        let handle = world().end_capture(queue).unwrap();
        assert!(!MEMORY.is_live(address) && !MEMORY.is_live(kept));
        for _ in 0..2 {
            let graph = world().graph(handle).unwrap();
            world().push(queue, Step::Graph(graph)).unwrap();
            world().wait(queue).unwrap();
            assert!(!MEMORY.is_live(address) && MEMORY.is_live(kept));
        }
        world().drop_graph(handle).unwrap();
        assert!(!MEMORY.is_live(kept));
    }

    #[test]
    fn what_fails_says_so_once_and_takes_what_came_after_it_along() {
        let (queue, log) = (new_handle(), Log::default());
        let failing: Work = Arc::new(|| Err(Failure::new(Code::LAUNCH_FAILED, "on purpose")));
        world().push(queue, Step::Work(failing)).unwrap();
        push(queue, &log, 1);
        assert_eq!(code(world().wait(queue)), Code::LAUNCH_FAILED);
        world().wait(queue).unwrap();
        assert_eq!(written(&log), []);
        push(queue, &log, 2);
        world().wait(queue).unwrap();
        assert_eq!(written(&log), [2]);
    }
}
