//! A stream of noise on the host.

use super::generator::Generator;
use super::law::NoiseLaw;
#[cfg(test)]
use super::script;

/// The values of one row at one site, in order, from generators of their own.
pub(super) struct Stream {
    generator: Generator,
    /// What names the stream, and the values already drawn.
    #[cfg(test)]
    drawn: (u64, u64),
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self {
            generator: Generator::new(seed),
            #[cfg(test)]
            drawn: (seed, 0),
        }
    }

    /// Fills `out` with `scale`·ε of the next values.
    pub fn fill(&mut self, law: NoiseLaw, scale: f32, out: &mut [f32]) {
        #[cfg(test)]
        if script::is_on() {
            out.iter_mut().for_each(|v| *v = scale * script::sign(law, &mut self.drawn));
            return;
        }
        law.fill(&mut self.generator, scale, out);
    }

    /// Adds `weight`·s(ε) of the next values to `out`.
    pub fn add_score(&mut self, law: NoiseLaw, weight: f32, out: &mut [f32]) {
        #[cfg(test)]
        if script::is_on() {
            out.iter_mut().for_each(|v| *v += weight * script::sign(law, &mut self.drawn));
            return;
        }
        law.add_score(&mut self.generator, weight, out);
    }
}
