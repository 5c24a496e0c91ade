use std::io::Write;

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::*;

/// Builds pickles.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn op(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        let length = text.len() as u32;
        self.op(b"X").op(&length.to_le_bytes()).op(text.as_bytes())
    }

    fn int(self, value: usize) -> Self {
        let value = value as i32;
        self.op(b"J").op(&value.to_le_bytes())
    }

    fn global(self, module: &str, name: &str) -> Self {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    fn ints(self, values: &[usize]) -> Self {
        values.iter().fold(self.op(b"("), |writer, &value| writer.int(value)).op(b"t")
    }

    fn storage(self, class: &str, key: &str, count: usize) -> Self {
        self.op(b"(").text("storage").global("torch", class).text(key).text("cpu").int(count).op(b"tQ")
    }

    /// A tensor of f32 in the storage "0".
    fn tensor(self, count: usize, offset: usize, shape: &[usize], stride: &[usize]) -> Self {
        let writer = self.global("torch._utils", "_rebuild_tensor_v2").op(b"(").storage("FloatStorage", "0", count);
        writer.int(offset).ints(shape).ints(stride).op(b"\x89").global("collections", "OrderedDict").op(b")RtR")
    }

    /// A dictionary with one item.
    fn dict(key: &str, value: impl Fn(Self) -> Self) -> Self {
        value(Self::default().op(b"\x80\x02}").text(key)).op(b"s")
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Writes an archive as `torch.save` does.
fn archive(pickle: Writer, entries: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
    let pickle = pickle.op(b".").0;
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut zip = ZipWriter::new(file.reopen().unwrap());
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("data.pkl", pickle.as_slice())].iter().chain(entries) {
        zip.start_file(format!("model/{name}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    file
}

fn values(file: &tempfile::NamedTempFile, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensors = read(file.path()).unwrap();
    let tensor = tensors.iter().find(|tensor| tensor.full_path() == name).unwrap();
    let data = tensor.to_data().unwrap();
    (data.shape.to_vec(), data.to_vec().unwrap())
}

fn error(file: &tempfile::NamedTempFile) -> String {
    match read(file.path()) {
        Ok(tensors) => panic!("{} tensors were read", tensors.len()),
        Err(error) => error.to_string(),
    }
}

/// `w.t().contiguous().t()` has the values of w, and another stride. A slice has an offset.
#[test]
fn strides_and_offsets_are_followed() {
    let storage = floats(&[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    for (offset, shape, stride, expected) in [
        (0, [2, 3], [1, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        (0, [3, 2], [2, 1], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]),
        (2, [2, 2], [2, 1], vec![2.0, 5.0, 3.0, 6.0]),
        (1, [1, 3], [7, 2], vec![4.0, 5.0, 6.0]),
        (0, [0, 3], [3, 1], vec![]),
    ] {
        let pickle = Writer::dict("w", |writer| writer.tensor(6, offset, &shape, &stride));
        let file = archive(pickle, &[("data/0", &storage), ("byteorder", b"little")]);
        assert_eq!(values(&file, "w"), (shape.to_vec(), expected), "{offset}, {shape:?}, {stride:?}");
    }
}

/// A parameter inside a dictionary of a training script.
#[test]
fn parameters_and_nested_dictionaries_are_read() {
    let parameter = |writer: Writer| {
        writer.global("torch._utils", "_rebuild_parameter").op(b"(").tensor(2, 0, &[2], &[1]).op(b"\x88NtR")
    };
    let pickle = Writer::dict("state_dict", |writer| parameter(writer.op(b"}").text("head.bias")).op(b"s"));
    let pickle = pickle.text("epoch").int(3).op(b"s");
    let file = archive(pickle, &[("data/0", &floats(&[7.0, 8.0]))]);
    assert_eq!(values(&file, "head.bias"), (vec![2], vec![7.0, 8.0]));
}

#[test]
fn data_that_are_missing_are_errors() {
    let of = |count, offset, shape: &[usize], stride: &[usize]| {
        Writer::dict("w", |writer| writer.tensor(count, offset, shape, stride))
    };
    let six = floats(&[0.0; 6]);
    let whole: &[(&str, &[u8])] = &[("data/0", &six)];
    for (pickle, entries, expected) in [
        (of(6, 0, &[6], &[1]), &[][..], "'w' has no data in the file: storage 0"),
        (of(5, 0, &[5], &[1]), whole, "needs 20 bytes, and its storage 0 has 24"),
        (of(6, 1, &[6], &[1]), whole, "is [6] with the stride [1] from value 1 on, and its storage has 6 values"),
        (of(6, 0, &[3, 2], &[3, 1]), whole, "is [3, 2] with the stride [3, 1]"),
        (of(6, 0, &[2, 3], &[1]), whole, "is [2, 3] with the stride [1]"),
        (of(6, 0, &[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0]), whole, "and its storage has 6 values"),
        (Writer::dict("w", |writer| writer.int(1)), whole, "it holds no tensors; its keys are w"),
        (Writer::default().ints(&[1]), whole, "it holds a list, not a state dict"),
        (Writer::default().tensor(6, 0, &[6], &[1]), whole, "it holds a single tensor"),
        (Writer::default().global("a", "Net").op(b")R"), whole, "it holds an object of a.Net"),
    ] {
        let file = archive(pickle, entries);
        assert!(error(&file).contains(expected), "{}", error(&file));
    }
    let file = archive(of(6, 0, &[6], &[1]), &[("data/0", &six), ("byteorder", b"big")]);
    assert!(error(&file).contains("big-endian"), "{}", error(&file));
}

/// A flipped bit in the values fails the archive's checksum.
#[test]
fn damaged_values_are_an_error() {
    let pickle = Writer::dict("w", |writer| writer.tensor(3, 0, &[3], &[1]));
    let marked = floats(&[1.25, 2.5, 5.0]);
    let file = archive(pickle, &[("data/0", &marked)]);
    let mut bytes = std::fs::read(file.path()).unwrap();
    let at = bytes.windows(marked.len()).position(|window| window == marked).unwrap();
    bytes[at] ^= 1;
    std::fs::write(file.path(), bytes).unwrap();
    let found = read(file.path()).unwrap()[0].to_data();
    assert!(found.is_err_and(|e| e.to_string().contains("checksum")));
}

/// Deep nesting, tuples of tuples, lists and names that are copied over and over: all end, in memory
/// that follows the length of the pickle.
#[test]
fn hostile_pickles_end_in_one_line() {
    let deep = (0..1_000_000).fold(Writer::default().op(b")"), |writer, _| writer.op(b"\x85"));
    let doubling = (0..100_000).fold(Writer::default().op(b")"), |writer, _| writer.op(b"2\x86"));
    // d = {"a": d, "b": d}, over and over
    let dicts = (0..1000).fold(Writer::default().op(b"}q\x00"), |writer, _| {
        writer.op(b"}").text("a").op(b"h\x00s").text("b").op(b"h\x00sq\x00")
    });
    let items = (0..10_000).fold(Writer::default().op(b"("), |writer, i| writer.ints(&[i, i])).op(b"lq\x000");
    let copies = (0..10_000).fold(items, |writer, _| writer.global("collections", "OrderedDict").op(b"h\x00\x85R0"));
    let long = "n".repeat(1 << 20);
    let names = Writer::default().text(&long).op(b"q\x000");
    let names = (0..100_000).fold(names, |writer, _| writer.op(b"h\x00h\x00\x930"));
    let memo = Writer::default().op(b")r\xff\xff\xff\xff");
    for (pickle, expected) in [
        (deep, "it holds a list"),
        (doubling, "it holds a list"),
        (dicts, "it holds no tensors; its keys are a, b"),
        (copies, "it repeats a name or a list too often"),
        (names, "it repeats a name or a list too often"),
        (memo, "a slot of the memo is out of range"),
        (Writer::default().op(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff"), "it is cut off"),
        (Writer::default().op(b"0"), "the stack is empty"),
        (Writer::default().op(b"I1\n"), "the operation is none of protocols 2 to 5"),
    ] {
        let file = archive(pickle, &[]);
        let found = error(&file);
        assert!(found.contains(expected) && !found.contains('\n'), "{found}");
    }
}

/// Every cut, and 3,000 changed bytes, of a small file: a result or an error, never a panic.
#[test]
fn mutated_files_never_panic() {
    let pickle = Writer::dict("w", |writer| writer.tensor(6, 0, &[2, 3], &[1, 2]));
    let file = archive(pickle, &[("data/0", &floats(&[1.0; 6])), ("byteorder", b"little")]);
    let whole = std::fs::read(file.path()).unwrap();
    let trial = |bytes: &[u8]| {
        std::fs::write(file.path(), bytes).unwrap();
        let tensors = read(file.path()).unwrap_or_default();
        tensors.iter().for_each(|tensor| drop(tensor.to_data()));
    };
    (0..whole.len()).for_each(|length| trial(&whole[..length]));
    for i in 0..3000_usize {
        let mut bytes = whole.clone();
        let at = i.wrapping_mul(7919) % bytes.len();
        bytes[at] = bytes[at].wrapping_add((i / bytes.len()) as u8 * 37 + 1);
        trial(&bytes);
    }
}
