//! The backend of the examples and the benches, chosen by feature: cuda before wgpu before ndarray
//! before flex. Without any of these features it is flex.

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod float {
    #[cfg(not(feature = "bf16"))]
    pub type F = f32;
    #[cfg(feature = "bf16")]
    pub type F = burn::tensor::bf16;
}
#[cfg(feature = "cuda")]
mod chosen {
    pub type Backend = burn::backend::Cuda<super::float::F>;
    pub const NAME: &str = "cuda";
    pub const ON_HOST: bool = false;
}
#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
mod chosen {
    pub type Backend = burn::backend::Wgpu<super::float::F>;
    pub const NAME: &str = "wgpu";
    pub const ON_HOST: bool = false;
}
#[cfg(all(feature = "ndarray", not(any(feature = "cuda", feature = "wgpu"))))]
mod chosen {
    pub type Backend = burn::backend::NdArray;
    pub const NAME: &str = "ndarray";
    pub const ON_HOST: bool = true;
}
#[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "ndarray")))]
mod chosen {
    pub type Backend = burn::backend::Flex;
    pub const NAME: &str = "flex";
    pub const ON_HOST: bool = true;
}

/// The backend without autodiff, on which forward-only training runs.
pub type B = chosen::Backend;
/// The backend with autodiff, which burn-train and backpropagation need.
pub type AB = burn::backend::Autodiff<B>;
/// The device of both.
pub type Device = <B as burn::tensor::backend::BackendTypes>::Device;
/// The name of the backend, which is the name of its feature.
pub const NAME: &str = chosen::NAME;
/// Whether tensors lie in host memory.
pub const ON_HOST: bool = chosen::ON_HOST;

/// Returns the default device after a small computation on it has succeeded.
///
/// # Errors
/// If the backend finds no device, or the device computes wrongly.
pub fn device() -> anyhow::Result<Device> {
    use burn::tensor::Tensor;
    let probe = || {
        let device = Device::default();
        let sum = Tensor::<B, 1>::ones([8], &device).sum().into_data().iter::<f32>().next();
        (device, sum)
    };
    // Some backends panic when a driver is missing; the panic becomes an error of one line here.
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
