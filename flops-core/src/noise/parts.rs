//! Parts of a flat tensor, without a copy on Burn's CUDA and wgpu backends.
//!
//! Burn's `narrow` copies a part there unless it begins and ends at a multiple of the device's alignment.

use burn::prelude::*;

/// The parts of a flat tensor that begin at `places`, with their lengths.
///
/// On a device they must begin at a multiple of its alignment.
pub(crate) fn parts<B: Backend>(whole: Tensor<B, 1>, places: &[(usize, usize)]) -> Vec<Tensor<B, 1>> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if let Some(views) = device::views_of(&whole, places) {
        return views;
    }
    places.iter().map(|&(start, len)| whole.clone().narrow(0, start, len)).collect()
}

#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod device {
    use std::any::Any;
    use std::marker::PhantomData;

    use burn::prelude::*;
    use burn::tensor::TensorPrimitive;
    use burn::tensor::ops::FloatTensor;
    use burn::tensor::{bf16, f16};
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::tensor::CubeTensor;
    use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
    use burn_fusion::stream::{Operation, OperationStreams};
    use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
    use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

    use crate::noise::cubecl::any_backend;

    /// A backend whose tensors can be views of another.
    trait Views: Backend {
        /// Parts of a flat tensor, by their beginnings and lengths.
        fn views(whole: FloatTensor<Self>, places: &[(usize, usize)]) -> Vec<FloatTensor<Self>>;
    }

    /// The parts, where the backend has views.
    pub fn views_of<B: Backend>(whole: &Tensor<B, 1>, places: &[(usize, usize)]) -> Option<Vec<Tensor<B, 1>>> {
        fn on<B: Backend, K: Views>(whole: &Tensor<B, 1>, places: &[(usize, usize)]) -> Option<Vec<Tensor<B, 1>>> {
            let whole = (whole as &dyn Any).downcast_ref::<Tensor<K, 1>>()?.clone().into_primitive().tensor();
            let view = |part| Tensor::<K, 1>::from_primitive(TensorPrimitive::Float(part));
            let mut views: Option<Vec<Tensor<K, 1>>> = Some(K::views(whole, places).into_iter().map(view).collect());
            (&mut views as &mut dyn Any).downcast_mut::<Option<Vec<Tensor<B, 1>>>>()?.take()
        }
        any_backend!(on::<B>(whole, places))
    }

    impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> Views for CubeBackend<R, F, I, T> {
        fn views(whole: FloatTensor<Self>, places: &[(usize, usize)]) -> Vec<FloatTensor<Self>> {
            let whole = into_contiguous(whole);
            let (total, bytes) = (whole.meta.num_elements(), whole.dtype.size() as u64);
            let view = |&(start, len): &(usize, usize)| {
                let behind = (total - start - len) as u64 * bytes;
                let handle = whole.handle.clone().offset_start(start as u64 * bytes).offset_end(behind);
                let (client, device) = (whole.client.clone(), whole.device.clone());
                CubeTensor::new_contiguous(client, device, Shape::from([len]), handle, whole.dtype)
            };
            places.iter().map(view).collect()
        }
    }

    /// The views as a custom operation in fusion's queue.
    impl<K: FusionBackend + Views> Views for Fusion<K> {
        fn views(whole: FloatTensor<Self>, places: &[(usize, usize)]) -> Vec<FloatTensor<Self>> {
            #[derive(Debug)]
            struct Deferred<K> {
                ir: CustomOpIr,
                places: Vec<(usize, usize)>,
                backend: PhantomData<K>,
            }

            impl<K: FusionBackend + Views> Operation<K::FusionRuntime> for Deferred<K> {
                fn execute(&self, handles: &mut HandleContainer<<K::FusionRuntime as FusionRuntime>::FusionHandle>) {
                    let [whole] = &self.ir.inputs[..] else { unreachable!("the operation has one input") };
                    let views = K::views(handles.get_float_tensor::<K>(whole), &self.places);
                    for (out, view) in self.ir.outputs.iter().zip(views) {
                        handles.register_float_tensor::<K>(&out.id, view);
                    }
                }
            }

            let (client, dtype) = (whole.client.clone(), whole.dtype);
            let streams = OperationStreams::with_inputs([&whole]);
            let out =
                |&(_, len): &(usize, usize)| TensorIr::uninit(client.create_empty_handle(), Shape::from([len]), dtype);
            let outs: Vec<TensorIr> = places.iter().map(out).collect();
            let ir = CustomOpIr::new("flops_parts", &[whole.into_ir()], &outs);
            let operation = Deferred::<K> { ir: ir.clone(), places: places.to_vec(), backend: PhantomData };
            client.register(streams, OperationIr::Custom(ir), operation)
        }
    }

    #[cfg(test)]
    mod tests {
        use super::super::parts;
        use burn::prelude::*;

        #[cfg(feature = "cuda")]
        type Device = burn::backend::Cuda;
        #[cfg(not(feature = "cuda"))]
        type Device = burn::backend::Wgpu;

        /// Parts of any length, read, computed with, and written to: the others stay as they are.
        #[test]
        fn parts_of_a_device_are_those_of_the_host() {
            let whole = || Tensor::<Device, 1, Int>::arange(0..1034, &Default::default()).float();
            let values = |x: &Tensor<Device, 1>| x.to_data().iter::<f32>().collect::<Vec<_>>();
            let expected = |(start, len): (usize, usize)| (start..start + len).map(|i| i as f32).collect::<Vec<_>>();
            let places = [(0, 3), (256, 256), (512, 10), (768, 266)];
            let views = parts(whole(), &places);
            let mut changed = vec![];
            for (view, place) in views.iter().zip(places) {
                assert_eq!(values(view), expected(place));
                changed.push(view.clone() * 2.0 + 1.0);
            }
            let doubled = views[1].clone().reshape([16, 16]).matmul(Tensor::<Device, 2>::eye(16, &Default::default()));
            let [a, b, c, d]: [Tensor<Device, 1>; 4] = views.try_into().unwrap();
            // of two that are left, one is written to
            let [first, _, last, _]: [Tensor<Device, 1>; 4] = parts(whole(), &places).try_into().unwrap();
            assert_eq!((values(&(first + 1.0)), values(&last)), (vec![1.0, 2.0, 3.0], expected(places[2])));
            let b = b.slice_fill(0..4, 7.0);
            assert_eq!(values(&b)[..5], [7.0, 7.0, 7.0, 7.0, 260.0]);
            assert_eq!(
                (values(&a), values(&c), values(&d)),
                (expected(places[0]), expected(places[2]), expected(places[3]))
            );
            assert_eq!(values(&doubled.reshape([256])), expected(places[1]));
            for (changed, place) in changed.iter().zip(places) {
                let twice: Vec<f32> = expected(place).iter().map(|v| 2.0 * v + 1.0).collect();
                assert_eq!(values(changed), twice);
            }
        }
    }
}
