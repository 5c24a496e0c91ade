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
