// Builds the wiring of a sorting network and its plan. Host only; the same networks, comparator by
// comparator, as fmkernels/ops/soft_sort/networks.py, where they are described.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "fmkernels/sorting_plan.h"

namespace fmkernels {

using Wires = std::pair<int32_t, int32_t>;  // lo, hi
using Layer = std::vector<Wires>;

inline int32_t merge_depth(int32_t n) {
  int32_t depth = 0;
  while ((int64_t{1} << depth) < n) ++depth;
  return depth;
}

inline std::vector<Layer> bitonic_layers(int32_t n) {
  const int32_t depth = merge_depth(n), missing = (1 << depth) - n;
  std::vector<Layer> layers;
  for (int32_t block = 0; block < depth; ++block) {
    for (int32_t distance = 1 << block; distance > 0; distance /= 2) {
      Layer layer;
      for (int32_t wire = missing; wire + distance < (1 << depth); ++wire) {
        if (wire & distance) continue;
        const int32_t a = wire - missing, b = a + distance;
        const bool descending = (wire >> (block + 1)) & 1;
        layer.push_back(descending ? Wires{b, a} : Wires{a, b});
      }
      layers.push_back(std::move(layer));
    }
  }
  return layers;
}

inline std::vector<Layer> reflected_bitonic_layers(int32_t n) {
  const int32_t depth = merge_depth(n);
  std::vector<Layer> layers;
  for (int32_t block = 0; block < depth; ++block) {
    const int32_t mirror = (2 << block) - 1;
    Layer first;
    for (int32_t a = 0; a < n; ++a) {
      if (a < (a ^ mirror) && (a ^ mirror) < n) first.push_back({a, a ^ mirror});
    }
    layers.push_back(std::move(first));
    for (int32_t distance = (1 << block) / 2; distance > 0; distance /= 2) {
      Layer layer;
      for (int32_t a = 0; a + distance < n; ++a) {
        if (!(a & distance)) layer.push_back({a, a + distance});
      }
      layers.push_back(std::move(layer));
    }
  }
  return layers;
}

inline std::vector<Layer> odd_even_merge_layers(int32_t n) {
  const int32_t depth = merge_depth(n);
  std::vector<Layer> layers;
  for (int32_t block = 0; block < depth; ++block) {
    const int32_t size = 2 << block;
    for (int32_t distance = 1 << block; distance > 0; distance /= 2) {
      Layer layer;
      for (int32_t start = distance % (size / 2); start + distance < n; start += 2 * distance) {
        for (int32_t a = start; a < std::min(start + distance, n - distance); ++a) {
          if (a / size == (a + distance) / size) layer.push_back({a, a + distance});
        }
      }
      layers.push_back(std::move(layer));
    }
  }
  return layers;
}

inline std::vector<Layer> odd_even_layers(int32_t n) {
  std::vector<Layer> layers(n);
  for (int32_t index = 0; index < n; ++index) {
    for (int32_t a = index % 2; a + 1 < n; a += 2) layers[index].push_back({a, a + 1});
  }
  return layers;
}

// The layers of a network, empty ones left out; no layer at all for an unknown name.
inline std::vector<Layer> network_layers(const std::string& network, int32_t n) {
  std::vector<Layer> layers;
  if (network == "bitonic") layers = bitonic_layers(n);
  if (network == "reflected_bitonic") layers = reflected_bitonic_layers(n);
  if (network == "odd_even_merge") layers = odd_even_merge_layers(n);
  if (network == "odd_even") layers = odd_even_layers(n);
  layers.erase(
      std::remove_if(layers.begin(), layers.end(), [](const Layer& l) { return l.empty(); }),
      layers.end());
  return layers;
}

// Owns what a SortingPlan points to.
class SortingNetwork {
 public:
  // group_rows: the most rows that a kernel takes through the network together.
  SortingNetwork(const std::string& network, int32_t n, int32_t group_rows = max_group_rows)
      : size_(n) {
    const std::vector<Layer> layers = network_layers(network, n);
    for (const Layer& layer : layers) {
      layers_.push_back(static_cast<int32_t>(comparators_.size()));
      for (const Wires& wires : layer) comparators_.push_back({wires.first, wires.second, 0});
    }
    layers_.push_back(static_cast<int32_t>(comparators_.size()));
    int32_t first = 0;  // comparator that begins the layer
    for (size_t index = 0; index < layers.size(); index += 2) {
      const int32_t count = static_cast<int32_t>(layers[index].size());
      const int32_t next =
          index + 1 < layers.size() ? static_cast<int32_t>(layers[index + 1].size()) : 0;
      add_two_layers(first, first + count, first + count + next);
      first += count + next;
    }
    make_groups(group_rows, network == "bitonic" ? (1 << merge_depth(n)) - n : 0);
    find_active();
  }

  SortingPlan plan() const {
    return {
        size_,
        static_cast<int32_t>(comparators_.size()),
        static_cast<int32_t>(layers_.size()) - 1,
        static_cast<int32_t>(segments_.size()),
        static_cast<int32_t>(groups_.size()),
        tape_count_,
        comparators_.data(),
        layers_.data(),
        quads_.data(),
        pairs_.data(),
        segments_.data(),
        segment_of_slot_.data(),
        groups_.data(),
        active_.data()};
  }

  // What unpack_plan() of packed_plan.h reads.
  std::vector<int32_t> packed() const {
    const SortingPlan p = plan();
    std::vector<int32_t> table{
        p.size, p.comparator_count, p.layer_count, p.segment_count, p.group_count, p.tape_count,
        static_cast<int32_t>(quads_.size()), static_cast<int32_t>(pairs_.size())};
    append(comparators_, table);
    append(layers_, table);
    append(quads_, table);
    append(pairs_, table);
    append(segments_, table);
    append(segment_of_slot_, table);
    append(groups_, table);
    append(active_, table);
    return table;
  }

 private:
  template <class Element>
  static void append(const std::vector<Element>& elements, std::vector<int32_t>& table) {
    static_assert(sizeof(Element) % sizeof(int32_t) == 0);
    const size_t end = table.size();
    table.resize(end + elements.size() * sizeof(Element) / sizeof(int32_t));
    if (elements.empty()) return;
    std::memcpy(table.data() + end, elements.data(), elements.size() * sizeof(Element));
  }

  // Comparators [first, middle) are one layer and [middle, last) the next: take out the quads,
  // leave the rest as pairs.
  void add_two_layers(int32_t first, int32_t middle, int32_t last) {
    std::vector<int32_t> upper(size_, -1), lower(size_, -1);  // wire -> comparator of its layer
    for (int32_t c = first; c < last; ++c) {
      std::vector<int32_t>& layer = c < middle ? upper : lower;
      layer[comparators_[c].lo] = layer[comparators_[c].hi] = c;
    }
    const auto partner = [this](int32_t comparator, int32_t wire) {
      const Comparator& c = comparators_[comparator];
      return c.lo == wire ? c.hi : c.lo;
    };
    std::vector<bool> in_quad(last - first, false);
    const Segment quads{1, static_cast<int32_t>(quads_.size()), 0, slots_};
    for (int32_t c = first; c < middle; ++c) {
      if (in_quad[c - first]) continue;
      const int32_t w0 = comparators_[c].lo, w1 = comparators_[c].hi;
      if (lower[w0] < 0 || lower[w1] < 0 || lower[w0] == lower[w1]) continue;
      const int32_t w2 = partner(lower[w0], w0), w3 = partner(lower[w1], w1);
      if (upper[w2] < 0 || upper[w2] != upper[w3]) continue;
      const int32_t members[4] = {c, upper[w2], lower[w0], lower[w1]};
      quads_.push_back({{w0, w1, w2, w3}, slots_});
      for (int32_t member : members) {
        comparators_[member].slot = slots_++;
        in_quad[member - first] = true;
      }
    }
    close_segment(quads, static_cast<int32_t>(quads_.size()));
    for (const auto& [from, to] : {Wires{first, middle}, Wires{middle, last}}) {
      const Segment pairs{0, static_cast<int32_t>(pairs_.size()), 0, slots_};
      for (int32_t c = from; c < to; ++c) {
        if (in_quad[c - first]) continue;
        comparators_[c].slot = slots_++;
        pairs_.push_back({{comparators_[c].lo, comparators_[c].hi}, comparators_[c].slot});
      }
      close_segment(pairs, static_cast<int32_t>(pairs_.size()));
    }
  }

  void close_segment(Segment segment, int32_t end) {
    segment.count = end - segment.first;
    if (segment.count == 0) return;
    segment_of_slot_.resize(slots_, static_cast<int32_t>(segments_.size()));
    segments_.push_back(segment);
  }

  // Rows of one group should spread alike: no group crosses the border of a block of its size, and
  // with `missing` wires below wire 0 the blocks begin at odd places.
  void make_groups(int32_t most_rows, int32_t missing) {
    for (int32_t row = 0; row < size_; row += groups_.back().count) {
      int32_t count = most_rows;
      while (row + count > size_ || (row + missing) % count != 0) count /= 2;
      groups_.push_back({row, count});
    }
  }

  // Follows which wires the rows of a group have reached, segment by segment.
  void find_active() {
    active_.reserve(groups_.size() * segments_.size());
    for (const RowGroup& group : groups_) {
      std::vector<bool> reached(size_, false);
      std::fill_n(reached.begin() + group.first, group.count, true);
      int32_t tape = 0;
      for (const Segment& segment : segments_) {
        Active range{segment.first, segment.first, 0};
        for (int32_t index = segment.first; index < segment.first + segment.count; ++index) {
          const int32_t* wires =
              segment.is_quads ? quads_[index].wire : pairs_[index].wire;
          const int32_t width = segment.is_quads ? 4 : 2;
          const bool any = std::any_of(wires, wires + width, [&](int32_t w) { return reached[w]; });
          if (!any) continue;
          for (int32_t k = 0; k < width; ++k) reached[wires[k]] = true;
          if (range.first == range.last) range.first = index;
          range.last = index + 1;
        }
        const int32_t slots = segment.is_quads ? 4 : 1;  // of a quad, of a pair
        range.tape_shift = tape - segment.first_slot - slots * (range.first - segment.first);
        tape += slots * (range.last - range.first);
        active_.push_back(range);
      }
      tape_count_ = std::max(tape_count_, tape);
    }
  }

  int32_t size_;
  int32_t slots_ = 0;
  int32_t tape_count_ = 0;
  std::vector<Comparator> comparators_;
  std::vector<int32_t> layers_;
  std::vector<Quad> quads_;
  std::vector<Pair> pairs_;
  std::vector<Segment> segments_;
  std::vector<int32_t> segment_of_slot_;
  std::vector<RowGroup> groups_;
  std::vector<Active> active_;
};

}  // namespace fmkernels
