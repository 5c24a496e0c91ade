//! Small trained parameters side by side: a device perturbs all of them in one kernel.

/// Parameters begin at multiples of it. Such a part of a tensor is a view of it on a device, not a copy.
const ALIGNMENT: usize = 256;
/// Values that lie side by side, at most: 64 MiB in single precision.
const MOST: usize = 1 << 24;

/// Where trained parameters begin in one tensor of their values.
///
/// The smallest lie there, as many as fit; a larger one takes a kernel of its own, which has enough to do.
/// Between two of them a few values belong to none.
#[derive(Clone, Debug, Default)]
pub(super) struct Packing {
    /// Where the packed parameters begin, and their lengths.
    places: Vec<(usize, usize)>,
    /// The place of each trained parameter; `None` for one that stays on its own.
    of_parameters: Vec<Option<usize>>,
    len: usize,
}

impl Packing {
    /// Packs the parameters that have a length here.
    pub fn new(lens: &[Option<usize>]) -> Self {
        let mut order: Vec<(usize, usize)> =
            lens.iter().enumerate().filter_map(|(i, len)| Some((i, (*len)?))).filter(|(_, len)| *len > 0).collect();
        order.sort_by_key(|&(_, len)| len);
        let mut packed = Self { places: vec![], of_parameters: vec![None; lens.len()], len: 0 };
        for (i, len) in order {
            let end = packed.len + len.next_multiple_of(ALIGNMENT);
            if end > MOST {
                break;
            }
            packed.of_parameters[i] = Some(packed.places.len());
            packed.places.push((packed.len, len));
            packed.len = end;
        }
        // one alone gains nothing
        if packed.places.len() > 1 { packed } else { Self::default() }
    }

    /// Values of the tensor; 0 where nothing is packed.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the packed parameters begin in it, and their lengths.
    pub fn places(&self) -> &[(usize, usize)] {
        &self.places
    }

    /// The number of a trained parameter's place, if it is packed.
    pub fn place(&self, parameter: usize) -> Option<usize> {
        *self.of_parameters.get(parameter)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_lie_apart_and_begin_where_a_view_can() {
        let packing = Packing::new(&[Some(300), None, Some(1), Some(256), Some(MOST), Some(7)]);
        assert_eq!(packing.places(), [(0, 1), (256, 7), (512, 256), (768, 300)]);
        let places: Vec<Option<usize>> = (0..7).map(|parameter| packing.place(parameter)).collect();
        assert_eq!(places, [Some(3), None, Some(0), Some(2), None, Some(1), None]);
        assert_eq!(packing.len(), 1280);
    }

    #[test]
    fn one_parameter_alone_is_not_packed() {
        for lens in [vec![], vec![Some(5)], vec![None, Some(5)], vec![Some(5), Some(MOST)], vec![Some(0), Some(0)]] {
            let packing = Packing::new(&lens);
            assert_eq!((packing.len(), packing.place(0), packing.place(1)), (0, None, None), "{lens:?}");
        }
    }
}
