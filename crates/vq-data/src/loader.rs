use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::random::{coin_flips, permutation};
use crate::{Dataset, Error, Normalization};

/// How a [`Loader`] makes batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Images in a batch.
    pub batch_size: usize,
    /// Whether each epoch has an order of its own; else that of the dataset.
    pub shuffle: bool,
    /// Whether each image is mirrored left to right in half of the epochs.
    pub flip: bool,
    /// Whether the images that do not fill a last batch are left out of the epoch.
    pub drop_last: bool,
    /// The seed of the orders and flips.
    pub seed: u64,
    /// Batches prepared ahead on a thread of their own; 0 prepares each when it is asked for.
    pub prefetch: usize,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self { batch_size: 128, shuffle: true, flip: true, drop_last: true, seed: 0, prefetch: 4 }
    }
}

impl LoaderOptions {
    /// For judging: every image once, in its order, as it is.
    pub fn in_order(batch_size: usize) -> Self {
        let seed = Self::default().seed;
        Self { batch_size, shuffle: false, flip: false, drop_last: false, seed, prefetch: 2 }
    }
}

/// Images to train on or to judge by.
#[derive(Clone, Debug)]
pub struct Batch {
    /// f32 `[B,C,H,W]`, normalised; on the [loader's device](Loader::on_device).
    pub images: Tensor,
    /// u32 `[B]`, on the CPU; 0 where there are no classes.
    pub labels: Tensor,
    /// Which images of the dataset these are.
    pub indices: Vec<usize>,
}

/// Images as they are, not normalised nor mirrored yet: a quarter of the bytes, for programs that do that where
/// the pixels go.
#[derive(Clone, Debug)]
pub struct RawBatch {
    /// u8 `[B,C,H,W]`, on the [loader's device](Loader::on_device).
    pub pixels: Tensor,
    /// Which of these are to be mirrored left to right.
    pub mirrored: Vec<bool>,
}

/// What takes the pixels of [`RawBatch`]es to a device.
pub trait PixelRoute: Send + Sync {
    /// Has `write` set so many bytes, and takes them there: u8 of that shape `[B,C,H,W]`, ready for any thread.
    fn take(
        &self,
        shape: [usize; 4],
        write: &mut dyn FnMut(&mut [u8]) -> Result<(), Error>,
    ) -> Result<Tensor, Error>;
}

/// What a batch holds, without the pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picks {
    /// Which images of the dataset.
    pub indices: Vec<usize>,
    /// Which of these are mirrored left to right.
    pub mirrored: Vec<bool>,
}

/// Makes the batches of a dataset, epoch by epoch.
///
/// The order of an epoch and its flips come from streams keyed by the seed and the epoch, so batch
/// `n` of epoch `e` is the same whatever was read before it and however many are prepared ahead.
#[derive(Clone)]
pub struct Loader {
    dataset: Arc<dyn Dataset>,
    normalization: Normalization,
    tables: Arc<[[f32; 256]]>,
    options: LoaderOptions,
    device: Device,
    /// For raw batches, instead of `device`.
    route: Option<Arc<dyn PixelRoute>>,
    /// Threads of its own for costly reads: waiting for the global pool could wait for the very
    /// thread that waits for the batch.
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Loader {
    /// Refuses an empty dataset, a batch size of 0, one that leaves no batch, and a normalization
    /// that does not fit.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        normalization: Normalization,
        options: LoaderOptions,
    ) -> Result<Self, Error> {
        normalization.validate(dataset.shape().channels)?;
        let (batch_size, len) = (options.batch_size, dataset.len());
        if batch_size == 0 {
            return Err(Error::BatchSizeZero);
        }
        if len == 0 {
            return Err(Error::EmptyDataset(dataset.name().to_owned()));
        }
        if options.drop_last && batch_size > len {
            return Err(Error::BatchTooLarge { batch_size, len });
        }
        let pool = if dataset.is_costly() {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(rayon::current_num_threads())
                .thread_name(|i| format!("vq-data-{i}"))
                .build()
                .map_err(|error| Error::Worker(error.to_string()))?;
            Some(Arc::new(pool))
        } else {
            None
        };
        let tables = normalization.tables().into();
        let device = Device::Cpu;
        Ok(Self { dataset, normalization, tables, options, device, route: None, pool })
    }

    /// The same batches with their images on `device`: with [`LoaderOptions::prefetch`] they are copied
    /// there ahead, by the thread that makes them.
    #[must_use]
    pub fn on_device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// The same batches, whose pixels go to a device by `route` where they are [as they are](Self::raw_epoch).
    #[must_use]
    pub fn with_route(mut self, route: Arc<dyn PixelRoute>) -> Self {
        self.route = Some(route);
        self
    }

    /// The dataset that the batches are made of.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.dataset
    }

    /// What is done to the pixels.
    pub fn normalization(&self) -> &Normalization {
        &self.normalization
    }

    /// How the batches are made.
    pub fn options(&self) -> &LoaderOptions {
        &self.options
    }

    /// The number of batches in each epoch.
    pub fn batches_per_epoch(&self) -> usize {
        let (len, size) = (self.dataset.len(), self.options.batch_size);
        if self.options.drop_last { len / size } else { len.div_ceil(size) }
    }

    /// The batches of an epoch from number `first_batch` on. An error ends it.
    ///
    /// Dropping the iterator stops its thread.
    pub fn epoch(&self, epoch: u64, first_batch: usize) -> Batches {
        self.start(epoch, first_batch, make_batch)
    }

    /// [`epoch`](Self::epoch) with the images as they are.
    pub fn raw_epoch(&self, epoch: u64, first_batch: usize) -> Batches<RawBatch> {
        self.start(epoch, first_batch, make_raw_batch)
    }

    fn start<T: Send + 'static>(
        &self,
        epoch: u64,
        first_batch: usize,
        make: Make<T>,
    ) -> Batches<T> {
        let last = self.batches_per_epoch();
        let remaining = last.saturating_sub(first_batch);
        let stop = Arc::new(AtomicBool::new(false));
        let (loader, plan) = (self.clone(), None);
        let mut worker =
            Worker { loader, epoch, next: first_batch, plan, make, stop: stop.clone() };
        if self.options.prefetch == 0 || remaining == 0 {
            return Batches { remaining, feed: Feed::Inline(Box::new(worker)) };
        }
        // One batch is held by the blocked thread, so the channel needs one place less.
        let (sender, receiver) = sync_channel(self.options.prefetch - 1);
        let run = move || {
            for _ in 0..remaining {
                let batch = worker.next_batch();
                let failed = batch.is_err();
                // A batch that nobody takes any more comes back, to be dropped here.
                if sender.send(batch).is_err() || failed {
                    break;
                }
            }
            // On CUDA a thread must not end with anything left in its queue: one in four then hung there.
            // Whatever is wrong with the device, whoever uses it learns.
            let _ = wait_for(&worker.loader.device);
        };
        let feed = match std::thread::Builder::new().name("vq-data-loader".to_owned()).spawn(run) {
            Ok(thread) => {
                Feed::Thread(Prefetch { receiver: Some(receiver), thread: Some(thread), stop })
            }
            Err(error) => Feed::Failed(Error::Worker(error.to_string())),
        };
        Batches { remaining, feed }
    }

    /// What the batches of [`epoch`](Self::epoch) hold, for programs that have the pixels elsewhere.
    pub fn picks(
        &self,
        epoch: u64,
        first_batch: usize,
    ) -> impl Iterator<Item = Picks> + Send + use<> {
        let plan = Plan::new(self.dataset.len(), epoch, &self.options);
        let size = self.options.batch_size;
        (first_batch..self.batches_per_epoch()).map(move |number| {
            let indices = plan.indices(number, size).to_vec();
            let mirrored = indices.iter().map(|&index| plan.is_mirrored(index)).collect();
            Picks { indices, mirrored }
        })
    }
}

/// The order of an epoch and its flips.
struct Plan {
    order: Vec<usize>,
    /// One bit per image; none where nothing is flipped.
    flips: Vec<u32>,
}

impl Plan {
    fn new(len: usize, epoch: u64, options: &LoaderOptions) -> Self {
        let seed = options.seed;
        let order =
            if options.shuffle { permutation(len, seed, epoch) } else { (0..len).collect() };
        let flips = if options.flip { coin_flips(len, seed, epoch) } else { Vec::new() };
        Self { order, flips }
    }

    /// The images of a batch.
    fn indices(&self, number: usize, batch_size: usize) -> &[usize] {
        let start = number * batch_size;
        let end = (start + batch_size).min(self.order.len());
        self.order.get(start..end).unwrap_or_default()
    }

    fn is_mirrored(&self, index: usize) -> bool {
        self.flips.get(index / 32).is_some_and(|word| word >> (index % 32) & 1 == 1)
    }
}

/// The batches of an epoch, in order; made by [`Loader::epoch`] and [`Loader::raw_epoch`].
pub struct Batches<T = Batch> {
    remaining: usize,
    feed: Feed<T>,
}

impl<T> Iterator for Batches<T> {
    type Item = Result<T, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            self.feed = Feed::Done;
            return None;
        }
        let batch = match &mut self.feed {
            Feed::Inline(worker) => worker.next_batch(),
            Feed::Thread(prefetch) => prefetch.receive(),
            Feed::Failed(_) | Feed::Done => match std::mem::replace(&mut self.feed, Feed::Done) {
                Feed::Failed(error) => Err(error),
                _ => return None,
            },
        };
        self.remaining = if batch.is_ok() { self.remaining - 1 } else { 0 };
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining.min(1), Some(self.remaining))
    }
}

impl<T> std::iter::FusedIterator for Batches<T> {}

enum Feed<T> {
    Inline(Box<Worker<T>>),
    Thread(Prefetch<T>),
    Failed(Error),
    Done,
}

struct Prefetch<T> {
    receiver: Option<Receiver<Result<T, Error>>>,
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl<T> Prefetch<T> {
    fn receive(&self) -> Result<T, Error> {
        let gone = || Error::Worker("it ended early".to_owned());
        self.receiver.as_ref().ok_or_else(gone)?.recv().map_err(|_| gone())?
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A thread that waits to send sees the receiver go; one that reads stops at the next image.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // Its panics were caught, so there is nothing to learn from the result.
            let _ = thread.join();
        }
    }
}

/// Makes the batch of these images.
type Make<T> = fn(&Loader, &Plan, Vec<usize>, &AtomicBool) -> Result<T, Error>;

struct Worker<T> {
    loader: Loader,
    epoch: u64,
    next: usize,
    /// Once it is needed.
    plan: Option<Plan>,
    make: Make<T>,
    stop: Arc<AtomicBool>,
}

impl<T> Worker<T> {
    /// A panic in a dataset becomes an error here, so that nobody waits for it forever.
    fn next_batch(&mut self) -> Result<T, Error> {
        match catch_unwind(AssertUnwindSafe(|| self.make_batch())) {
            Ok(batch) => batch,
            Err(panic) => Err(Error::Worker(panic_message(&*panic))),
        }
    }

    fn make_batch(&mut self) -> Result<T, Error> {
        let Loader { dataset, options, .. } = &self.loader;
        let plan = self.plan.get_or_insert_with(|| Plan::new(dataset.len(), self.epoch, options));
        let indices = plan.indices(self.next, options.batch_size).to_vec();
        self.next += 1;
        (self.make)(&self.loader, plan, indices, &self.stop)
    }
}

fn make_batch(
    loader: &Loader,
    plan: &Plan,
    indices: Vec<usize>,
    stop: &AtomicBool,
) -> Result<Batch, Error> {
    let Loader { dataset, tables, device, .. } = loader;
    let shape = dataset.shape();
    let size = shape.pixels();
    let mut images = vec![0_f32; indices.len() * size];
    loader.read_each(&indices, &mut images, stop, |scratch: &mut Vec<u8>, index, out| {
        scratch.resize(size, 0);
        dataset.read(index, scratch)?;
        normalize(scratch, out, shape.width, tables, plan.is_mirrored(index));
        Ok(())
    })?;
    let count = indices.len();
    let labels: Vec<u32> = indices.iter().map(|&index| dataset.label(index)).collect();
    let images = loader.to_device(Tensor::from_vec(
        images,
        (count, shape.channels, shape.height, shape.width),
        device,
    )?)?;
    Ok(Batch { images, labels: Tensor::from_vec(labels, count, &Device::Cpu)?, indices })
}

#[allow(clippy::needless_pass_by_value, reason = "of the same type as make_batch")]
fn make_raw_batch(
    loader: &Loader,
    plan: &Plan,
    indices: Vec<usize>,
    stop: &AtomicBool,
) -> Result<RawBatch, Error> {
    let Loader { dataset, device, route, .. } = loader;
    let shape = dataset.shape();
    let mut read = |pixels: &mut [u8]| {
        let read = |(): &mut (), index, out: &mut [u8]| dataset.read(index, out);
        loader.read_each(&indices, pixels, stop, read)
    };
    let dims = [indices.len(), shape.channels, shape.height, shape.width];
    let pixels = if let Some(route) = route {
        route.take(dims, &mut read)?
    } else {
        let mut pixels = vec![0_u8; dims.iter().product()];
        read(&mut pixels)?;
        loader.to_device(Tensor::from_vec(pixels, &dims[..], device)?)?
    };
    let mirrored = indices.iter().map(|&index| plan.is_mirrored(index)).collect();
    Ok(RawBatch { pixels, mirrored })
}

impl Loader {
    /// Reads images into as many equal parts of `out`; on several threads where that pays.
    fn read_each<O: Send, S: Default + Send>(
        &self,
        indices: &[usize],
        out: &mut [O],
        stop: &AtomicBool,
        read: impl Fn(&mut S, usize, &mut [O]) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        let size = self.dataset.shape().pixels();
        let read = |scratch: &mut S, (&index, out): (&usize, &mut [O])| {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Worker("it was stopped".to_owned()));
            }
            read(scratch, index, out)
        };
        if let Some(pool) = &self.pool {
            return pool.install(|| {
                indices
                    .par_iter()
                    .zip(out.par_chunks_exact_mut(size))
                    .try_for_each_init(S::default, read)
            });
        }
        let mut scratch = S::default();
        indices.iter().zip(out.chunks_exact_mut(size)).try_for_each(|item| read(&mut scratch, item))
    }

    /// A tensor that has been made for another thread.
    fn to_device(&self, tensor: Tensor) -> Result<Tensor, Error> {
        wait_for(&self.device)?;
        Ok(tensor)
    }
}

/// Waits until a device has done what this thread gave it; also where something went wrong before, which CUDA's
/// bindings say instead of waiting.
fn wait_for(device: &Device) -> candle_core::Result<()> {
    device.synchronize().inspect_err(|_| {
        let _ = device.synchronize();
    })
}

/// u8 `[C,H,W]` → f32 `[C,H,W]` by the tables of its channels, mirrored left to right if `flip`.
fn normalize(image: &[u8], out: &mut [f32], width: usize, tables: &[[f32; 256]], flip: bool) {
    let plane = image.len() / tables.len();
    let planes = image.chunks_exact(plane).zip(out.chunks_exact_mut(plane));
    for ((from, to), table) in planes.zip(tables) {
        for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
            if flip {
                for (x, &pixel) in to.iter_mut().zip(from.iter().rev()) {
                    *x = table[usize::from(pixel)];
                }
            } else {
                for (x, &pixel) in to.iter_mut().zip(from) {
                    *x = table[usize::from(pixel)];
                }
            }
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("it panicked: {}", text.unwrap_or("with no message"))
}

#[cfg(test)]
mod tests;
