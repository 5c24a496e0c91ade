//! Labelled rows of numbers.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use burn::prelude::*;
use flops_core::Batch;

/// One row in so many is for testing.
const TEST_EVERY: usize = 5;

/// Rows of numbers, each with a label.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Numbers of a row, without its label.
    pub features: usize,
    /// Row by row.
    pub values: Vec<f32>,
    /// The class of each row, from 0.
    pub labels: Vec<usize>,
}

impl Table {
    /// Reads a CSV file without a header, whose last column is the class.
    pub fn read(file: &Path) -> Result<Self> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).with_context(|| format!("{name}: cannot be read as text"))?;
        Self::parse(&text, &name)
    }

    /// Reads lines of CSV; errors call them `name`.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let (mut features, mut values, mut labels) = (0, vec![], vec![]);
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let mut row = vec![];
            for cell in line.split(',') {
                let value: Option<f32> = cell.trim().parse().ok().filter(|value: &f32| value.is_finite());
                row.push(value.with_context(|| {
                    format!(
                        "{name}, line {}: {:?} is no number; use numbers alone, without a header",
                        i + 1,
                        cell.trim()
                    )
                })?);
            }
            let label = row.pop().unwrap_or_default();
            ensure!(
                label >= 0.0 && label.fract() == 0.0,
                "{name}, line {}: the last column has {label}, which is no label; end each row with its class",
                i + 1
            );
            if labels.is_empty() {
                features = row.len();
            }
            ensure!(
                row.len() == features && features > 0,
                "{name}, line {}: {} features and a label where {features} are needed; give all rows as many columns",
                i + 1,
                row.len()
            );
            values.extend(row);
            labels.push(label as usize);
        }
        if labels.len() < TEST_EVERY {
            bail!("{name}: {} rows; use at least {TEST_EVERY}, of which every fifth is for testing", labels.len());
        }
        Ok(Self { features, values, labels })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The rows to train on, and those to test with: every fifth.
    pub fn split(&self) -> (Self, Self) {
        let (test, train) = (0..self.len()).partition::<Vec<_>, _>(|row| row.is_multiple_of(TEST_EVERY));
        (self.select(&train), self.select(&test))
    }

    fn select(&self, rows: &[usize]) -> Self {
        let values = rows.iter().flat_map(|&row| &self.values[row * self.features..][..self.features]);
        let labels = rows.iter().map(|&row| self.labels[row]);
        Self { features: self.features, values: values.copied().collect(), labels: labels.collect() }
    }

    /// Mean and standard deviation of each feature; 1 for the latter where a feature never varies.
    pub fn moments(&self) -> (Vec<f32>, Vec<f32>) {
        let moments = (0..self.features).map(|feature| {
            let column = || self.values.iter().skip(feature).step_by(self.features).map(|&value| f64::from(value));
            let mean = column().sum::<f64>() / self.len() as f64;
            let variance = column().map(|value| (value - mean).powi(2)).sum::<f64>() / self.len() as f64;
            (mean as f32, if variance > 0.0 { variance.sqrt() as f32 } else { 1.0 })
        });
        moments.unzip()
    }

    /// Some rows as a batch.
    pub fn batch<B: Backend>(&self, rows: &[usize], device: &B::Device) -> Batch<Tensor<B, 2>, Tensor<B, 1, Int>> {
        let picked = self.select(rows);
        let labels: Vec<i32> = picked.labels.iter().map(|&label| label as i32).collect();
        Batch {
            ids: rows.iter().map(|&row| row as u64).collect(),
            input: Tensor::from_data(TensorData::new(picked.values, [rows.len(), self.features]), device),
            target: Tensor::from_data(TensorData::new(labels, [rows.len()]), device),
        }
    }

    /// All rows as a batch.
    pub fn all<B: Backend>(&self, device: &B::Device) -> Batch<Tensor<B, 2>, Tensor<B, 1, Int>> {
        self.batch(&(0..self.len()).collect::<Vec<_>>(), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_split() {
        let table = Table::parse("0,.5,1\n1, 2 ,0\n\n2,3,1\n3,4,1\n4,5,0\n5,6,1\n", "x").unwrap();
        assert_eq!((table.features, table.labels.as_slice()), (2, &[1, 0, 1, 1, 0, 1][..]));
        let (train, test) = table.split();
        assert_eq!((train.values.as_slice(), train.labels.len()), (&[1., 2., 2., 3., 3., 4., 4., 5.][..], 4));
        assert_eq!(test, Table { features: 2, values: vec![0., 0.5, 5., 6.], labels: vec![1, 1] });
        assert_eq!(test.moments(), (vec![2.5, 3.25], vec![2.5, 2.75]));
    }

    #[test]
    fn errors_name_the_line_and_the_remedy() {
        let error = |text: &str| Table::parse(text, "x.csv").unwrap_err().to_string();
        assert!(error("a,b\n1,2\n").starts_with("x.csv, line 1: \"a\" is no number"), "{}", error("a,b\n"));
        assert!(error("1,2\n1,0.5\n").starts_with("x.csv, line 2: the last column has 0.5, which is no label"));
        assert!(error("1,2\n1,2,3\n").starts_with("x.csv, line 2: 2 features and a label where 1 are needed"));
        assert!(error("1\n").contains("0 features"), "{}", error("1\n"));
        assert!(error("1,NaN\n").contains("\"NaN\" is no number"));
        assert_eq!(error(""), "x.csv: 0 rows; use at least 5, of which every fifth is for testing");
        let missing = format!("{:#}", Table::read(Path::new("no/such.csv")).unwrap_err());
        assert!(missing.starts_with("no/such.csv: cannot be read as text: "), "{missing}");
    }
}
