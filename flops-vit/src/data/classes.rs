//! The classes of a data set among the outputs of a model: by name or number, never by chance.

use super::error::some;
use std::collections::HashMap;

/// Which outputs of a model stand for the classes of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClassOutputs {
    /// The index of the output for each class of the data. No output occurs twice.
    pub outputs: Vec<usize>,
    /// The name of each output of the model: as the data calls it, where it has that class.
    pub names: Vec<String>,
    /// How the outputs were found.
    pub by: MatchedBy,
    /// What the user should know of it, a line each.
    pub remarks: Vec<String>,
}

/// How the outputs of classes were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MatchedBy {
    /// By their names.
    Name,
    /// By their numbers: the class `003` is output 3.
    Number,
    /// By ImageNet's WordNet ids, whose order is that of its models' outputs.
    WordNetId,
    /// By position, since the outputs have no names.
    Position,
}

/// Why classes are not found among the outputs of a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClassError {
    /// The model has no output of that name.
    #[error(
        "the model knows {} classes ({}) and {} of the data's {of} are not among them ({}): choose weights with a \
         head for this data set, rename its folders, or train a new head",
        model.len(), some(model.iter()), unknown.len(), some(unknown.iter())
    )]
    Unknown {
        /// The names of the model's outputs.
        model: Vec<String>,
        /// The classes that are not among them.
        unknown: Vec<String>,
        /// The number of the data's classes.
        of: usize,
    },
    /// Several outputs have the name of a class.
    #[error(
        "the class {class} may be output {first} ({first_name}) or output {second} ({second_name}) of the model: \
         call it by its full name, or by the number of the output"
    )]
    Ambiguous {
        /// The class of the data.
        class: String,
        /// One of the outputs.
        first: usize,
        /// Its name.
        first_name: String,
        /// Another output.
        second: usize,
        /// Its name.
        second_name: String,
    },
    /// Two classes of the data have the same output.
    #[error("the classes {first} and {second} are both output {output} of the model ({name}): merge or rename them")]
    Twice {
        /// One of the classes.
        first: String,
        /// The other one.
        second: String,
        /// The output.
        output: usize,
        /// Its name.
        name: String,
    },
    /// A class is the number of no output.
    #[error(
        "the classes are numbers, and {class} is none of the model's {outputs} outputs ({example}): outputs count \
         from 0; rename the folders, or choose weights with a head for this data set"
    )]
    NoSuchNumber {
        /// The class of the data.
        class: String,
        /// The number of outputs.
        outputs: usize,
        /// The first and the last output.
        example: String,
    },
}

impl ClassOutputs {
    /// Finds the classes `data` among the outputs that are called `model`.
    ///
    /// The first of these rules that holds for all classes decides:
    /// 1. Names, exactly; else without regard to case and to `_`, `-` and spaces; else as one of
    ///    the synonyms of an output, as in ImageNet's `tabby, tabby cat`.
    /// 2. Numbers: `3`, `003`, `LABEL_3` and `class_3` are the output of that number. If the outputs
    ///    are called by numbers too, these count, otherwise their index.
    /// 3. The 1000 WordNet ids of ImageNet, in their order.
    /// 4. The position, if all outputs are called `LABEL_0`, `LABEL_1` and so on, and are as many.
    ///
    /// The data may lack classes of the model, under the first two rules.
    ///
    /// # Errors
    /// [`ClassError`] where no rule holds for all classes, or where it names no single output.
    pub fn find(model: &[String], data: &[String]) -> Result<Self, ClassError> {
        if model == data {
            let outputs = (0..data.len()).collect();
            return Ok(Self { outputs, names: data.to_vec(), by: MatchedBy::Name, remarks: vec![] });
        }
        let named = by_name(model, data)?;
        let unknown: Vec<String> = data.iter().zip(&named).filter(|c| c.1.is_none()).map(|c| c.0.clone()).collect();
        let (outputs, by, remark) = if unknown.is_empty() {
            let outputs: Vec<usize> = named.into_iter().flatten().collect();
            let other = example(model, data, &outputs, |class, output| class != output);
            let remark = other.map(|example| format!("some classes are called otherwise by the model: {example}"));
            (outputs, MatchedBy::Name, remark)
        } else if let Some(outputs) = by_number(model, data) {
            let outputs = outputs?;
            let other = example(model, data, &outputs, |_, _| true).unwrap_or_default();
            let remark = format!("the data's classes are numbers, taken as those of the model's outputs: {other}");
            (outputs, MatchedBy::Number, Some(remark))
        } else if is_imagenet(model, data) {
            ((0..data.len()).collect(), MatchedBy::WordNetId, None)
        } else if model.len() == data.len() && are_placeholders(model) && !data.iter().any(|c| number(c).is_some()) {
            let outputs: Vec<usize> = (0..data.len()).collect();
            let other = example(model, data, &outputs, |_, _| true).unwrap_or_default();
            let remark =
                format!("the model's outputs have no names; they are taken in the order of the data's: {other}");
            (outputs, MatchedBy::Position, Some(remark))
        } else {
            return Err(ClassError::Unknown { model: model.to_vec(), unknown, of: data.len() });
        };
        check_distinct(model, data, &outputs)?;
        let mut remarks: Vec<String> = remark.into_iter().collect();
        if outputs.len() < model.len() {
            let (ours, all) = (outputs.len(), model.len());
            remarks.push(format!("the data has {ours} of the model's {all} classes; all {all} may be predicted"));
        }
        let mut names = model.to_vec();
        outputs.iter().zip(data).for_each(|(&output, class)| names[output].clone_from(class));
        Ok(Self { outputs, names, by, remarks })
    }

    /// Returns the class of the data that an output stands for, if there is one.
    pub fn class(&self, output: usize) -> Option<usize> {
        self.outputs.iter().position(|&other| other == output)
    }
}

/// Returns the only output of each name, by the first rule of names that finds one.
fn by_name(model: &[String], data: &[String]) -> Result<Vec<Option<usize>>, ClassError> {
    type Spellings = fn(&str) -> Vec<String>;
    let rules: [Spellings; 3] = [
        |name| vec![name.to_string()],
        |name| vec![plain(name)],
        |name| name.split(',').map(plain).filter(|synonym| !synonym.is_empty()).collect(),
    ];
    let mut found: Vec<Option<usize>> = vec![None; data.len()];
    for (rule, spell) in rules.into_iter().enumerate() {
        let mut outputs: HashMap<String, Vec<usize>> = HashMap::new();
        for (output, name) in model.iter().enumerate() {
            let mut spellings = spell(name);
            spellings.sort();
            spellings.dedup();
            spellings.into_iter().for_each(|name| outputs.entry(name).or_default().push(output));
        }
        for (class, found) in data.iter().zip(&mut found).filter(|c| c.1.is_none()) {
            let class_name = if rule == 0 { class.clone() } else { plain(class) };
            match outputs.get(&class_name).map(Vec::as_slice) {
                None => {}
                Some([output]) => *found = Some(*output),
                Some(several) => {
                    let (first, second) = (several[0], several[1]);
                    let (first_name, second_name) = (model[first].clone(), model[second].clone());
                    return Err(ClassError::Ambiguous { class: class.clone(), first, first_name, second, second_name });
                }
            }
        }
    }
    Ok(found)
}

/// A name in lower case, its words with one space between them.
fn plain(name: &str) -> String {
    let name = name.to_lowercase().replace(['_', '-'], " ");
    name.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the outputs if all classes are numbers.
fn by_number(model: &[String], data: &[String]) -> Option<Result<Vec<usize>, ClassError>> {
    let numbers: Vec<usize> = data.iter().map(|class| number(class)).collect::<Option<_>>()?;
    let named: Option<Vec<usize>> = model.iter().map(|name| number(name)).collect();
    let outputs: HashMap<usize, usize> = match named {
        Some(named) => named.into_iter().enumerate().map(|(output, number)| (number, output)).collect(),
        None => (0..model.len()).map(|output| (output, output)).collect(),
    };
    // `3` and `03` among the outputs are no numbers to go by
    if outputs.len() < model.len() {
        return None;
    }
    let ends: Vec<&String> = model.first().into_iter().chain(model.last()).collect();
    let find = |(class, number): (&String, &usize)| {
        outputs.get(number).copied().ok_or_else(|| ClassError::NoSuchNumber {
            class: class.clone(),
            outputs: model.len(),
            example: ends.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(" to "),
        })
    };
    Some(data.iter().zip(&numbers).map(find).collect())
}

/// The number that a name is, alone or behind `label` or `class`.
fn number(name: &str) -> Option<usize> {
    let plain = plain(name);
    let digits = ["label", "class"].iter().find_map(|word| plain.strip_prefix(word)).unwrap_or(&plain).trim_start();
    let is_number = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| digits.parse().ok()).flatten()
}

/// Whether all outputs have the names that `transformers` gives by default: `LABEL_0` and so on.
fn are_placeholders(model: &[String]) -> bool {
    let is_one = |(output, name): (usize, &String)| number(name) == Some(output) && !name.starts_with(char::is_numeric);
    model.iter().enumerate().all(is_one)
}

/// Some of ImageNet's 1000 classes: index, WordNet id and first name.
const IMAGENET: [(usize, &str, &str); 5] = [
    (0, "n01440764", "tench"),
    (217, "n02102040", "english springer"),
    (574, "n03445777", "golf ball"),
    (949, "n07745940", "strawberry"),
    (999, "n15075141", "toilet tissue"),
];

/// Whether the data are ImageNet's folders and the model's outputs its classes.
fn is_imagenet(model: &[String], data: &[String]) -> bool {
    let called = |output: usize, name: &str| model[output].split(',').any(|synonym| plain(synonym) == name);
    let classes = IMAGENET.last().map_or(0, |last| last.0 + 1);
    model.len() == classes
        && data.len() == classes
        && IMAGENET.iter().all(|&(index, id, name)| data[index] == id && called(index, name))
}

/// Names the first classes and their outputs for which `wanted` holds.
fn example(
    model: &[String],
    data: &[String],
    outputs: &[usize],
    wanted: impl Fn(&String, &String) -> bool,
) -> Option<String> {
    let pairs = data.iter().zip(outputs).map(|(class, &output)| (class, &model[output]));
    let named: Vec<String> =
        pairs.filter(|(class, name)| wanted(class, name)).map(|(class, name)| format!("{class} is {name}")).collect();
    (!named.is_empty()).then(|| some(named.iter()))
}

fn check_distinct(model: &[String], data: &[String], outputs: &[usize]) -> Result<(), ClassError> {
    let mut seen: HashMap<usize, &String> = HashMap::new();
    for (class, &output) in data.iter().zip(outputs) {
        if let Some(first) = seen.insert(output, class) {
            let (first, second, name) = (first.clone(), class.clone(), model[output].clone());
            return Err(ClassError::Twice { first, second, output, name });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
