//! The backend, chosen by feature: cuda before wgpu before ndarray before flex.

#[cfg(feature = "cuda")]
mod chosen {
    pub type Backend = burn::backend::Cuda;
    pub const NAME: &str = "cuda";
}
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
mod chosen {
    pub type Backend = burn::backend::Wgpu;
    pub const NAME: &str = "wgpu";
}
#[cfg(all(feature = "ndarray", not(any(feature = "cuda", feature = "wgpu"))))]
mod chosen {
    pub type Backend = burn::backend::NdArray;
    pub const NAME: &str = "ndarray";
}
#[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "ndarray")))]
mod chosen {
    pub type Backend = burn::backend::Flex;
    pub const NAME: &str = "flex";
}

/// The backend without a graph: what forward-only training runs on.
pub type B = chosen::Backend;
/// The same with a graph: what burn-train asks for, and what backpropagation needs.
pub type AB = burn::backend::Autodiff<B>;
/// The device of both.
pub type Device = <B as burn::tensor::backend::BackendTypes>::Device;
/// The name of the feature.
pub const NAME: &str = chosen::NAME;

/// The default device, once a small computation on it has succeeded.
///
/// # Errors
/// Where the backend finds no device, or one that does not compute.
pub fn device() -> anyhow::Result<Device> {
    use burn::tensor::Tensor;
    let probe = || {
        let device = Device::default();
        let sum = Tensor::<B, 1>::ones([8], &device).sum().into_data().iter::<f32>().next();
        (device, sum)
    };
    // a missing driver makes some backends panic: here it is an answer, not an accident
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let answer = std::panic::catch_unwind(probe);
    std::panic::set_hook(hook);
    let remedy = "install its driver, or build without its feature to run on the CPU";
    match answer {
        Ok((device, Some(8.0))) => Ok(device),
        Ok(_) => anyhow::bail!("the {NAME} device computes wrongly; {remedy}"),
        Err(_) => anyhow::bail!("the {NAME} backend finds no usable device; {remedy}"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_device_computes() {
        assert!(super::device().is_ok());
    }
}
