//! Values as bytes, for the [jobs](crate::executor::Jobs) of other workers.
//!
//! Numbers are little-endian, and a list begins with its length. A reader takes bytes of any origin: what
//! is too short, too long or of an absurd length reads as `None`.

use burn::tensor::TensorData;

/// Appends values.
#[derive(Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub fn number(&mut self, value: usize) {
        self.0.extend((value as u64).to_le_bytes());
    }

    pub fn doubles(&mut self, values: &[f64]) {
        self.number(values.len());
        values.iter().for_each(|v| self.0.extend(v.to_le_bytes()));
    }

    pub fn singles(&mut self, values: &[f32]) {
        self.number(values.len());
        values.iter().for_each(|v| self.0.extend(v.to_le_bytes()));
    }

    pub fn flags(&mut self, values: &[bool]) {
        self.number(values.len());
        self.0.extend(values.iter().map(|&v| u8::from(v)));
    }

    pub fn bytes(&mut self, values: &[u8]) {
        self.number(values.len());
        self.0.extend(values);
    }

    /// Sizes and values of a tensor; its type is not written.
    pub fn tensor(&mut self, data: &TensorData) {
        self.number(data.shape.len());
        data.shape.iter().for_each(|&size| self.number(size));
        self.bytes(data.as_bytes());
    }
}

/// Reads values in the order in which they were written.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn number(&mut self) -> Option<usize> {
        u64::from_le_bytes(self.take(8)?.try_into().ok()?).try_into().ok()
    }

    /// A list of entries of `size` bytes.
    fn list(&mut self, size: usize) -> Option<&'a [u8]> {
        let len = self.number()?.checked_mul(size)?;
        self.take(len)
    }

    pub fn doubles(&mut self) -> Option<Vec<f64>> {
        let values = self.list(8)?.chunks_exact(8);
        values.map(|v| Some(f64::from_le_bytes(v.try_into().ok()?))).collect()
    }

    pub fn singles(&mut self) -> Option<Vec<f32>> {
        let values = self.list(4)?.chunks_exact(4);
        values.map(|v| Some(f32::from_le_bytes(v.try_into().ok()?))).collect()
    }

    pub fn flags(&mut self) -> Option<Vec<bool>> {
        self.list(1)?.iter().map(|&v| (v <= 1).then_some(v == 1)).collect()
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        self.list(1)
    }

    /// A tensor of the type and the axes of `like`, whose rows, the first axis, may be of another number.
    pub fn tensor(&mut self, like: &TensorData) -> Option<TensorData> {
        let axes = self.number().filter(|&axes| axes == like.shape.len())?;
        let shape: Vec<usize> = (0..axes).map(|_| self.number()).collect::<Option<_>>()?;
        let bytes = self.bytes()?;
        let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
        let fits =
            shape.get(1..) == like.shape.get(1..) && elements.checked_mul(like.dtype.size()) == Some(bytes.len());
        fits.then(|| TensorData::from_bytes_vec(bytes.to_vec(), shape, like.dtype))
    }

    /// Whether all bytes were read.
    pub fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.number(7);
        writer.doubles(&[f64::NAN, -0.0]);
        writer.singles(&[1.5, f32::INFINITY]);
        writer.flags(&[true, false]);
        writer.tensor(&TensorData::new(vec![1i32, 2, 3, 4], [2, 2]));
        writer.into_bytes()
    }

    fn read(bytes: &[u8]) -> Option<TensorData> {
        let mut reader = Reader::new(bytes);
        let like = TensorData::new(vec![0i32; 2], [1, 2]);
        let (seven, doubles, singles) = (reader.number()?, reader.doubles()?, reader.singles()?);
        let (flags, tensor) = (reader.flags()?, reader.tensor(&like)?);
        reader.end()?;
        assert!(seven == 7 && doubles[0].is_nan() && doubles[1].is_sign_negative());
        assert!(singles == [1.5, f32::INFINITY] && flags == [true, false]);
        Some(tensor)
    }

    #[test]
    fn values_come_back() {
        assert_eq!(read(&written()), Some(TensorData::new(vec![1i32, 2, 3, 4], [2, 2])));
    }

    /// No prefix, no longer message and no other length is taken, and none panics.
    #[test]
    fn broken_bytes_are_refused() {
        let bytes = written();
        (0..bytes.len()).for_each(|len| assert_eq!(read(&bytes[..len]), None));
        assert_eq!(read(&[bytes.clone(), vec![0]].concat()), None);
        for at in [8, 32, 48, 58] {
            let mut broken = bytes.clone();
            broken[at..at + 8].fill(0xff);
            assert_eq!(read(&broken), None, "length at {at}");
        }
    }
}
