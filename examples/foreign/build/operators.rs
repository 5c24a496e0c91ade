//! The operators that an ONNX file names, which burn-onnx does not tell when it knows one not at all.

/// The names of all operators of the main graph that are no part of ONNX itself, or else of all.
pub fn foreign(bytes: &[u8]) -> Vec<String> {
    // ModelProto.graph is field 7, GraphProto.node 1; NodeProto.op_type 4 and NodeProto.domain 7
    let nodes: Vec<&[u8]> = fields(bytes, 7).into_iter().flat_map(|graph| fields(graph, 1)).collect();
    let is_foreign = |node: &&&[u8]| text(node, 7).is_some_and(|domain| !domain.is_empty() && domain != "ai.onnx");
    let mut names: Vec<String> = nodes.iter().filter(is_foreign).filter_map(|node| text(node, 4)).collect();
    if names.is_empty() {
        names = nodes.iter().filter_map(|node| text(node, 4)).collect();
    }
    names.sort();
    names.dedup();
    names
}

fn text(node: &[u8], field: u64) -> Option<String> {
    fields(node, field).first().map(|text| String::from_utf8_lossy(text).into_owned())
}

/// The values of a field of a protobuf message that have a length; those before a fault.
fn fields(mut bytes: &[u8], wanted: u64) -> Vec<&[u8]> {
    let mut found = vec![];
    while let Some(key) = varint(&mut bytes) {
        let skipped = match key & 7 {
            0 => varint(&mut bytes).map(|_| 0),
            1 => Some(8),
            2 => varint(&mut bytes).map(|length| length as usize),
            5 => Some(4),
            _ => None,
        };
        let Some((value, rest)) = skipped.and_then(|length| bytes.split_at_checked(length)) else { break };
        if key >> 3 == wanted && key & 7 == 2 {
            found.push(value);
        }
        bytes = rest;
    }
    found
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
