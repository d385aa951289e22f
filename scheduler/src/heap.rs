//! A binary heap of tenant slots with a position table, so that any slot can
//! be re-keyed or removed in O(log n). Grows with the number of slots only;
//! nothing is allocated on the steady path.

/// Not in the heap.
const ABSENT: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry<K> {
    key: K,
    /// Ties go to whoever got this key first.
    order: u64,
    slot: u32,
}

/// Least key first; among equal keys, first come, first out.
#[derive(Clone, Debug)]
pub(crate) struct SlotHeap<K> {
    entries: Vec<Entry<K>>,
    positions: Vec<u32>,
    next_order: u64,
}

impl<K: Ord + Copy> SlotHeap<K> {
    pub(crate) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            positions: Vec::new(),
            next_order: 0,
        }
    }

    /// The least key and its slot.
    pub(crate) fn least(&self) -> Option<(K, u32)> {
        self.entries.first().map(|entry| (entry.key, entry.slot))
    }

    /// Puts `slot` in under `key`, or gives it that key. A slot that keeps its
    /// key keeps its place among equals.
    pub(crate) fn put(&mut self, slot: u32, key: K) {
        let index = slot as usize;
        if index >= self.positions.len() {
            self.positions.resize(index + 1, ABSENT);
        }
        let position = self.positions[index];
        if position != ABSENT && self.entries[position as usize].key == key {
            return;
        }
        let order = self.next_order;
        self.next_order += 1;
        let entry = Entry { key, order, slot };
        if position == ABSENT {
            self.entries.push(entry);
            self.sift_up(self.entries.len() - 1, entry);
        } else {
            self.resettle(position as usize, entry);
        }
    }

    /// Takes `slot` out; nothing happens when it is not in.
    pub(crate) fn remove(&mut self, slot: u32) {
        let Some(&position) = self.positions.get(slot as usize) else {
            return;
        };
        if position == ABSENT {
            return;
        }
        self.positions[slot as usize] = ABSENT;
        let Some(last) = self.entries.pop() else {
            return;
        };
        if last.slot != slot {
            self.resettle(position as usize, last);
        }
    }

    /// Places `entry` at `hole` or wherever order wants it from there.
    fn resettle(&mut self, hole: usize, entry: Entry<K>) {
        if hole > 0 && before(&entry, &self.entries[(hole - 1) / 2]) {
            self.sift_up(hole, entry);
        } else {
            self.sift_down(hole, entry);
        }
    }

    fn sift_up(&mut self, mut hole: usize, entry: Entry<K>) {
        while hole > 0 {
            let parent = (hole - 1) / 2;
            if !before(&entry, &self.entries[parent]) {
                break;
            }
            self.set(hole, self.entries[parent]);
            hole = parent;
        }
        self.set(hole, entry);
    }

    fn sift_down(&mut self, mut hole: usize, entry: Entry<K>) {
        loop {
            let mut child = 2 * hole + 1;
            if child >= self.entries.len() {
                break;
            }
            let right = child + 1;
            if right < self.entries.len() && before(&self.entries[right], &self.entries[child]) {
                child = right;
            }
            if !before(&self.entries[child], &entry) {
                break;
            }
            self.set(hole, self.entries[child]);
            hole = child;
        }
        self.set(hole, entry);
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "positions are below the number of slots, which is a u32"
    )]
    fn set(&mut self, position: usize, entry: Entry<K>) {
        self.positions[entry.slot as usize] = position as u32;
        self.entries[position] = entry;
    }
}

fn before<K: Ord>(a: &Entry<K>, b: &Entry<K>) -> bool {
    (&a.key, a.order) < (&b.key, b.order)
}

#[cfg(test)]
mod tests {
    use super::SlotHeap;

    #[test]
    fn equal_keys_leave_in_the_order_of_their_arrival() {
        let mut heap = SlotHeap::new();
        for slot in [7, 3, 5, 1] {
            heap.put(slot, 10);
        }
        heap.put(3, 10);
        let mut left = Vec::new();
        while let Some((_, slot)) = heap.least() {
            heap.remove(slot);
            left.push(slot);
        }
        assert_eq!(left, [7, 3, 5, 1]);
    }

    #[test]
    fn a_heap_agrees_with_a_sorted_list_under_any_changes() {
        let mut heap = SlotHeap::new();
        let mut model: Vec<(u64, u32)> = Vec::new();
        let mut state = 1_u64;
        for step in 0..20_000_u64 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let slot = u32::try_from((state >> 33) % 50).unwrap();
            // Distinct keys, so that the model needs no order among equals.
            let key = ((state >> 40) % 1_000) * 100_000 + step;
            model.retain(|&(_, other)| other != slot);
            if state >> 62 == 0 {
                heap.remove(slot);
            } else {
                heap.put(slot, key);
                model.push((key, slot));
            }
            assert_eq!(heap.least(), model.iter().min().copied());
        }
    }
}
