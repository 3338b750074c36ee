//! Which form of an operation runs.

use std::cell::Cell;
use std::sync::LazyLock;

use candle_core::Device;

/// `composed` or `primitives`: the form that operations have on the CPU too, so that the tests prove what
/// runs on devices without kernels of ours, or on CUDA.
const FORM_VARIABLE: &str = "VQ_OPS_FORM";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Each device's fastest.
    Fastest,
    /// Of candle's operations alone.
    Composed,
    /// As the fastest, but stacks and convolutions of [`crate::primitives`], as on CUDA.
    Primitives,
}

static FORM: LazyLock<Form> = LazyLock::new(|| match std::env::var(FORM_VARIABLE).as_deref() {
    Ok("composed") => Form::Composed,
    Ok("primitives") => Form::Primitives,
    _ => Form::Fastest,
});

/// The `cpu_fwd` of an operation on so many operands that is never given tensors of the CPU.
macro_rules! not_on_the_cpu {
    ($($operand:pat),+) => {
        fn cpu_fwd(
            &self,
            $($operand: &candle_core::CpuStorage, _: &candle_core::Layout,)+
        ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
            candle_core::bail!("{} has another form on the CPU", self.name())
        }
    };
}
pub(crate) use not_on_the_cpu;

thread_local! {
    static FORCED: Cell<Option<Form>> = const { Cell::new(None) };
}

/// Whether the CPU kernels take tensors of this device.
pub(crate) fn on_cpu(device: &Device) -> bool {
    device.is_cpu() && form() != Form::Composed
}

/// Whether the CUDA kernels take tensors of this device.
pub(crate) fn on_cuda(device: &Device) -> bool {
    cfg!(feature = "cuda") && device.is_cuda() && form() != Form::Composed
}

/// Whether stacks and convolutions run as primitives on this device.
pub(crate) fn on_primitives(device: &Device) -> bool {
    on_cuda(device) || (device.is_cpu() && form() == Form::Primitives)
}

fn form() -> Form {
    FORCED.get().unwrap_or(*FORM)
}

/// [`crate::composed::only`].
pub(crate) fn only_composed<R>(work: impl FnOnce() -> R) -> R {
    with_form(Form::Composed, work)
}

/// Stacks and convolutions as on CUDA, on this thread.
#[cfg(test)]
pub(crate) fn only_primitives<R>(work: impl FnOnce() -> R) -> R {
    with_form(Form::Primitives, work)
}

fn with_form<R>(form: Form, work: impl FnOnce() -> R) -> R {
    struct Restore(Option<Form>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(form)));
    work()
}
