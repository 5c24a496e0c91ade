//! Pickles as data: the objects of a pickle, of which none is called or executed.
//!
//! Objects are numbered, and refer to each other by number. So an object that is shared takes its
//! place once, however often it occurs, and nothing recurses: memory follows the length of the
//! pickle, whatever it says. Protocols 2 to 5 are read, as `torch.save` writes them.

use crate::error::PytorchError;

/// The longest pickle that is read. That of a model of a thousand tensors takes some 200 kB.
pub(super) const LONGEST: usize = 16 << 20;

/// The longest name of a module or a class that is kept.
const LONGEST_NAME: usize = 200;

/// The number of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(usize);

/// An object.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object {
    /// A number.
    Int(i64),
    /// Text.
    Text(String),
    /// A class or a function, as `module.name`.
    Global(String),
    /// A tuple or a list, or a set.
    List(Vec<Id>),
    /// A dictionary, ordered or not.
    Dict(Vec<(Id, Id)>),
    /// What a class or a function gives for these arguments.
    Call {
        /// The class or function.
        function: Id,
        /// A tuple.
        arguments: Id,
    },
    /// An object outside the pickle, by its description: PyTorch's storages.
    Outside(Id),
    /// A truth value.
    Truth(bool),
    /// None, a float, bytes, an integer of more than 64 bits.
    Other,
}

/// The objects of a pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    objects: Vec<Object>,
    /// The object that was pickled.
    pub root: Id,
    /// The length of the pickle.
    pub length: usize,
}

impl Pickle {
    /// Reads the pickle at the start of `bytes`.
    pub fn read(bytes: &[u8]) -> Result<Self, PytorchError> {
        let mut machine =
            Machine { bytes, at: 0, copied: 0, objects: vec![], stack: vec![], marks: vec![], memo: vec![] };
        loop {
            let start = machine.at;
            let step = machine.step().map_err(|why| PytorchError::Pickle { at: start, why })?;
            if let Some(root) = step {
                return Ok(Self { objects: machine.objects, root, length: machine.at });
            }
        }
    }

    /// Returns all objects.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }

    /// Returns an object.
    pub fn get(&self, id: Id) -> &Object {
        &self.objects[id.0]
    }

    /// Returns a text.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Object::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the name of a class or a function.
    pub fn global(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Object::Global(name) => Some(name),
            _ => None,
        }
    }

    /// Returns the elements of a tuple or a list.
    pub fn list(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Object::List(elements) => Some(elements),
            _ => None,
        }
    }

    /// Returns a number that is not negative.
    pub fn size(&self, id: Id) -> Option<usize> {
        match self.get(id) {
            Object::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns a tuple of numbers that are not negative.
    pub fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        self.list(id)?.iter().map(|&id| self.size(id)).collect()
    }
}

/// What a pickle can do wrong.
type Fault = &'static str;

const CUT: Fault = "it is cut off";
const EMPTY: Fault = "the stack is empty";

/// The machine that a pickle is a program of.
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Bytes of names and items of lists that were copied.
    copied: usize,
    objects: Vec<Object>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
}

impl Machine<'_> {
    /// Does one operation. The last one gives the pickled object.
    fn step(&mut self) -> Result<Option<Id>, Fault> {
        match self.byte()? {
            b'.' => return self.pop().map(Some),
            // protocol and frames say nothing of the objects
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            op => {
                let known = self.scalar(op)? || self.container(op)? || self.class(op)? || self.stacked(op)?;
                known.then_some(()).ok_or("the operation is none of protocols 2 to 5")?;
            }
        }
        Ok(None)
    }

    /// Reads a number, a text, or what is kept of neither; `false` where `op` is another operation.
    fn scalar(&mut self, op: u8) -> Result<bool, Fault> {
        let object = match op {
            b'N' => Object::Other,
            0x88 => Object::Truth(true),
            0x89 => Object::Truth(false),
            // a float
            b'G' => self.take(8).map(|_| Object::Other)?,
            b'K' => Object::Int(self.unsigned(1)? as i64),
            b'M' => Object::Int(self.unsigned(2)? as i64),
            b'J' => Object::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'U' => self.string(1)?,
            b'T' => self.string(4)?,
            b'C' => self.binary(1)?,
            b'B' => self.binary(4)?,
            0x8e | 0x96 => self.binary(8)?,
            _ => return Ok(false),
        };
        self.push(object);
        Ok(true)
    }

    /// Makes or fills a tuple, a list or a dictionary; `false` where `op` is another operation.
    fn container(&mut self, op: u8) -> Result<bool, Fault> {
        match op {
            b')' | b']' | 0x8f => self.push(Object::List(vec![])),
            b'}' => self.push(Object::Dict(vec![])),
            b'(' => self.marks.push(self.stack.len()),
            b't' | b'l' | 0x91 => {
                let elements = self.pop_mark()?;
                self.push(Object::List(elements));
            }
            0x85..=0x87 => {
                let start = self.stack.len().checked_sub(usize::from(op - 0x84)).ok_or(EMPTY)?;
                let elements = self.stack.split_off(start);
                self.push(Object::List(elements));
            }
            b'd' => {
                let items = pairs(&self.pop_mark()?)?;
                self.push(Object::Dict(items));
            }
            b'a' => {
                let element = self.pop()?;
                self.append(vec![element])?;
            }
            b'e' | 0x90 => {
                let elements = self.pop_mark()?;
                self.append(elements)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(vec![(key, value)])?;
            }
            b'u' => {
                let items = pairs(&self.pop_mark()?)?;
                self.insert(items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Names a class or a function, or notes its use; `false` where `op` is another operation.
    fn class(&mut self, op: u8) -> Result<bool, Fault> {
        match op {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(format!("{module}.{name}")));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let part = |id: Id| match &self.objects[id.0] {
                    Object::Text(text) => Ok(text.as_str()),
                    _ => Err("the name of a class is no text"),
                };
                let global = [part(module)?, ".", part(name)?].map(|part| part.get(..LONGEST_NAME.min(part.len())));
                let global = global.into_iter().collect::<Option<String>>().ok_or("a name is no ASCII")?;
                self.count_copied(global.len())?;
                self.push(Object::Global(global));
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)?;
            }
            0x92 => {
                let (_keywords, arguments, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(class, arguments)?;
            }
            // the attributes of an object say nothing of what it holds
            b'b' => drop(self.pop()?),
            b'Q' => {
                let description = self.pop()?;
                self.push(Object::Outside(description));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Moves objects between the stack and the memo; `false` where `op` is another operation.
    fn stacked(&mut self, op: u8) -> Result<bool, Fault> {
        match op {
            b'q' => {
                let slot = self.unsigned(1)?;
                self.remember(slot)?;
            }
            b'r' => {
                let slot = self.unsigned(4)?;
                self.remember(slot)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' => {
                let slot = self.unsigned(1)?;
                self.recall(slot)?;
            }
            b'j' => {
                let slot = self.unsigned(4)?;
                self.recall(slot)?;
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => self.stack.push(*self.stack.last().ok_or(EMPTY)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take(&mut self, count: usize) -> Result<&[u8], Fault> {
        let end = self.at.checked_add(count).ok_or(CUT)?;
        let taken = self.bytes.get(self.at..end).ok_or(CUT)?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.take(N)?.try_into().map_err(|_| CUT)
    }

    /// Reads an unsigned number of so many bytes, at most 8.
    fn unsigned(&mut self, count: usize) -> Result<usize, Fault> {
        let value = self.take(count)?.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        usize::try_from(value).map_err(|_| CUT)
    }

    /// Takes as many bytes as the next `count` bytes say.
    fn counted(&mut self, count: usize) -> Result<&[u8], Fault> {
        let length = self.unsigned(count)?;
        self.take(length)
    }

    /// Reads an integer of any length.
    fn long(&mut self, count: usize) -> Result<Object, Fault> {
        let bytes = self.counted(count)?;
        let sign = if bytes.last().is_some_and(|byte| byte >> 7 == 1) { -1 } else { 0 };
        Ok(match bytes.len() {
            0..=8 => Object::Int(bytes.iter().rev().fold(sign, |value, &byte| value << 8 | i64::from(byte))),
            _ => Object::Other,
        })
    }

    fn text(&mut self, count: usize) -> Result<Object, Fault> {
        let text = std::str::from_utf8(self.counted(count)?).map_err(|_| "a text is not UTF-8")?;
        Ok(Object::Text(text.into()))
    }

    /// Reads a string of Python 2, whose encoding is not known.
    fn string(&mut self, count: usize) -> Result<Object, Fault> {
        Ok(std::str::from_utf8(self.counted(count)?).map_or(Object::Other, |text| Object::Text(text.into())))
    }

    fn binary(&mut self, count: usize) -> Result<Object, Fault> {
        self.counted(count).map(|_| Object::Other)
    }

    fn line(&mut self) -> Result<String, Fault> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or(CUT)?;
        let line = std::str::from_utf8(&rest[..length]).map_err(|_| "a name is not UTF-8")?;
        self.at += length + 1;
        Ok(line.to_string())
    }

    fn push(&mut self, object: Object) {
        self.stack.push(Id(self.objects.len()));
        self.objects.push(object);
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        // what lies below a mark belongs to another object
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor { Err(EMPTY) } else { self.stack.pop().ok_or(EMPTY) }
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        if mark > self.stack.len() {
            return Err(EMPTY);
        }
        Ok(self.stack.split_off(mark))
    }

    fn call(&mut self, function: Id, arguments: Id) -> Result<(), Fault> {
        match &self.objects[function.0] {
            // older versions of Python give the items as the argument
            Object::Global(name) if name == "collections.OrderedDict" => {
                let items = self.items_of(arguments);
                self.count_copied(items.len())?;
                self.push(Object::Dict(items));
            }
            _ => self.push(Object::Call { function, arguments }),
        }
        Ok(())
    }

    /// Counts what is copied. Without a limit a short pickle could copy a long list again and again.
    fn count_copied(&mut self, count: usize) -> Result<(), Fault> {
        self.copied += count;
        if self.copied > self.bytes.len() { Err("it repeats a name or a list too often") } else { Ok(()) }
    }

    /// Returns the items in the arguments of a dictionary's class: a list of pairs, or nothing.
    fn items_of(&self, arguments: Id) -> Vec<(Id, Id)> {
        let list = |id: Id| match &self.objects[id.0] {
            Object::List(elements) => elements.as_slice(),
            _ => &[],
        };
        let pair = |&id: &Id| match list(id) {
            &[key, value] => Some((key, value)),
            _ => None,
        };
        list(arguments).first().map_or(vec![], |&items| list(items).iter().filter_map(pair).collect())
    }

    fn append(&mut self, elements: Vec<Id>) -> Result<(), Fault> {
        match self.top()? {
            Object::List(all) => all.extend(elements),
            Object::Call { .. } => {}
            _ => return Err("elements are added to no list"),
        }
        Ok(())
    }

    fn insert(&mut self, items: Vec<(Id, Id)>) -> Result<(), Fault> {
        match self.top()? {
            Object::Dict(all) => all.extend(items),
            Object::Call { .. } => {}
            _ => return Err("items are added to no dictionary"),
        }
        Ok(())
    }

    fn top(&mut self) -> Result<&mut Object, Fault> {
        let id = *self.stack.last().ok_or(EMPTY)?;
        Ok(&mut self.objects[id.0])
    }

    fn remember(&mut self, slot: usize) -> Result<(), Fault> {
        let id = *self.stack.last().ok_or(EMPTY)?;
        // slots are numbered one after the other
        if slot > self.at {
            return Err("a slot of the memo is out of range");
        }
        if self.memo.len() <= slot {
            self.memo.resize(slot + 1, None);
        }
        self.memo[slot] = Some(id);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<(), Fault> {
        let id = self.memo.get(slot).copied().flatten().ok_or("a slot of the memo is empty")?;
        self.stack.push(id);
        Ok(())
    }
}

fn pairs(elements: &[Id]) -> Result<Vec<(Id, Id)>, Fault> {
    let chunks = elements.chunks_exact(2);
    if !chunks.remainder().is_empty() {
        return Err("a key has no value");
    }
    Ok(chunks.map(|pair| (pair[0], pair[1])).collect())
}
