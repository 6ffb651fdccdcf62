#include "soft_sort_common.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "fmkernels/networks.h"

namespace fmkernels {
namespace {

struct Entry {
  SortingNetwork network;
  SortingPlan plan;
  Entry(const std::string& name, int32_t n) : network(name, n), plan(network.plan()) {}
};

}  // namespace

const SortingPlan& sorting_plan(const std::string& network, int64_t n) {
  // most calls are for the same network as the one before
  static thread_local std::pair<std::string, int64_t> last_key;
  static thread_local const SortingPlan* last_plan = nullptr;
  if (last_plan != nullptr && last_key.second == n && last_key.first == network) return *last_plan;

  static std::mutex mutex;
  static std::map<std::pair<std::string, int64_t>, std::unique_ptr<Entry>> entries;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Entry>& entry = entries[{network, n}];
  if (entry == nullptr) {
    auto made = std::make_unique<Entry>(network, static_cast<int32_t>(n));
    if (n > 1 && made->plan.comparator_count == 0) {
      throw std::runtime_error("soft_sort: network: unknown name '" + network + "'");
    }
    entry = std::move(made);
  }
  last_key = {network, n};
  return *(last_plan = &entry->plan);
}

Distribution parse_distribution(const std::string& name) {
#define FMKERNELS_PARSE(known) \
  if (name == #known) return Distribution::known;
  FMKERNELS_DISTRIBUTIONS(FMKERNELS_PARSE)
#undef FMKERNELS_PARSE
  throw std::runtime_error("soft_sort: distribution: unknown name '" + name + "'");
}

}  // namespace fmkernels
