//! CUDA graphs.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use candle_core::cuda::WrapErr;
use candle_core::cuda::cudarc::driver::CudaGraph;
use candle_core::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::{CudaDevice, Result, bail};

use super::convolution::keep_workspaces;

/// The work of this thread's stream as a graph.
pub(crate) fn record(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let stream = device.cuda_stream();
    // Other threads may go on with theirs.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let worked = catch_unwind(AssertUnwindSafe(work));
    // In any case, or the stream would go on recording.
    let graph = stream
        .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        .w();
    worked.unwrap_or_else(|panic| resume_unwind(panic))?;
    let Some(graph) = graph? else { bail!("nothing was recorded") };
    keep_workspaces();
    Ok(graph)
}
