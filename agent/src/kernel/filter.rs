//! The agent's side of a filter map: bits are shared by all ids that fold onto them, so each is counted. Pure.

use umbra_agent_ebpf::filter_bit;

pub struct Filter {
    words: Vec<u64>,
    users: Vec<u32>,
}

impl Filter {
    /// `words` must be a power of two, as in [`filter_bit`].
    pub fn new(words: u32) -> Self {
        Self {
            words: vec![0; words as usize],
            users: vec![0; words as usize * 64],
        }
    }

    /// The word that must be written, if the id is the first on its bit.
    pub fn add(&mut self, id: u32) -> Option<(u32, u64)> {
        let (word, bit, users) = self.at(id)?;
        *users += 1;
        (*users == 1).then(|| self.update(word, |w| w | bit))
    }

    /// The word that must be written, if the id was the last on its bit.
    pub fn remove(&mut self, id: u32) -> Option<(u32, u64)> {
        let (word, bit, users) = self.at(id)?;
        if *users == 0 {
            return None;
        }
        *users -= 1;
        (*users == 0).then(|| self.update(word, |w| w & !bit))
    }

    fn at(&mut self, id: u32) -> Option<(u32, u64, &mut u32)> {
        let (word, bit) = filter_bit(id, self.words.len() as u32);
        let users = self.users.get_mut(word as usize * 64 + bit.trailing_zeros() as usize)?;
        Some((word, bit, users))
    }

    fn update(&mut self, word: u32, f: impl Fn(u64) -> u64) -> (u32, u64) {
        let value = self.words.get_mut(word as usize).map_or(0, |w| {
            *w = f(*w);
            *w
        });
        (word, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_stays_as_long_as_someone_needs_it() {
        let mut f = Filter::new(4);
        assert_eq!(f.add(65), Some((1, 0b10)));
        assert_eq!(f.add(66), Some((1, 0b110)));
        assert_eq!(f.add(65 + 256), None, "folds onto the same bit");
        assert_eq!(f.remove(65), None);
        assert_eq!(f.remove(65 + 256), Some((1, 0b100)));
        assert_eq!(f.remove(65), None, "removed once too often");
        assert_eq!(f.remove(66), Some((1, 0)));
    }
}
