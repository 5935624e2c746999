// The kernels' launches behind C functions, for ctypes.
#include "../../csrc/cuda/cam.cuh"
#include "../../csrc/cuda/cam_erase.cuh"
#include "../../csrc/cuda/cam_seeds.cuh"
#include "../../csrc/cuda/cam_transform_mse.cuh"
#include "../../csrc/cuda/cam_transform_mse_bwd.cuh"
#include "../../csrc/cuda/masked_max_pool.cuh"
#include "../../csrc/cuda/otsu_mask.cuh"
#include "../../csrc/cuda/stochastic_consistency.cuh"
#include "mistakes.h"

namespace camkernels::cuda {
namespace {

std::string last_error;

// What a test fixes about the machine.
struct Setting {
  int64_t seed;
  int32_t threads;
  int32_t cluster;  // the most blocks in a cluster; reached where there is enough to share out
  int32_t vectors;
  int32_t shared_limit;  // bytes that a block may have
};

class EmulatorLauncher {
 public:
  explicit EmulatorLauncher(const Setting& setting) : seed_(static_cast<uint64_t>(setting.seed)) {
    hardware_.multiprocessors = 1 << 20;  // so that a cluster takes as many blocks as it may
    hardware_.max_cluster = setting.cluster;
    hardware_.shared_limit = setting.shared_limit;
    hardware_.threads = setting.threads;
    hardware_.smallest_share = 0;
    hardware_.vectors = setting.vectors != 0;
    emulator::Machine::instance().max_shared = std::min<int64_t>(setting.shared_limit, emulator::kMaxShared);
  }

  const Hardware& hardware() const { return hardware_; }

  template <typename Kernel, typename Call>
  void run(Kernel kernel, const LaunchShape& shape, const Call& call) {
    emulator::Machine::instance().run(kernel, {shape.blocks, shape.threads, shape.cluster, shape.shared},
                                      call, seed_++);
  }

 private:
  Hardware hardware_;
  uint64_t seed_;
};

// Launches made, or -1 with the error's text in last_error.
template <typename Function>
int64_t guarded(const Setting* setting, Function&& function) {
  EmulatorLauncher launcher(*setting);
  const int64_t before = emulator::Machine::instance().launches;
  try {
    function(launcher);
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
  return emulator::Machine::instance().launches - before;
}

}  // namespace
}  // namespace camkernels::cuda

using namespace camkernels::cuda;

extern "C" {

const char* emulator_error() { return last_error.c_str(); }

// blocks, threads, cluster and bytes of shared memory of the last launch
void emulator_shape(int64_t* shape) {
  const emulator::Shape& last = emulator::Machine::instance().shape();
  shape[0] = last.blocks;
  shape[1] = last.threads;
  shape[2] = last.cluster;
  shape[3] = last.shared;
}

int64_t emulator_sizes(int64_t* sizes) {
  sizes[0] = sizeof(CamFwd);
  sizes[1] = sizeof(CamBwd);
  sizes[2] = sizeof(CamEraseFwd);
  sizes[3] = sizeof(CamEraseBwd);
  sizes[4] = sizeof(CamTransformMseFwd);
  sizes[5] = sizeof(CamTransformMseBwd);
  sizes[6] = sizeof(CamSeedsFwd);
  sizes[7] = sizeof(CamSeedsBwd);
  sizes[8] = sizeof(StochasticConsistencyFwd);
  sizes[9] = sizeof(StochasticConsistencyBwd);
  sizes[10] = sizeof(OtsuMaskFwd);
  sizes[11] = sizeof(MaskedMaxPoolFwd);
  sizes[12] = sizeof(MaskedMaxPoolBwd);
  return 13;
}

int64_t emulate_cam_fwd(const Setting* setting, const CamFwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) { launch_cam_fwd(launcher, *call); });
}

int64_t emulate_cam_bwd(const Setting* setting, const CamBwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    CamBwd with_scratch = *call;
    const auto size = static_cast<size_t>(cam_bwd_scratch(*call));
    std::vector<double> scratch(size / 2 + 1, NAN);  // aligned as torch aligns its tensors
    with_scratch.scratch = reinterpret_cast<float*>(scratch.data());
    launch_cam_bwd(launcher, with_scratch);
  });
}

int64_t emulate_cam_erase_fwd(const Setting* setting, const CamEraseFwd* call, const double* fill,
                              int64_t count) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    CamEraseFwd filled = *call;
    set_fill(filled.erasing, fill, count);
    launch_cam_erase_fwd(launcher, filled);
  });
}

int64_t emulate_cam_erase_bwd(const Setting* setting, const CamEraseBwd* call, const double* fill,
                              int64_t count) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    CamEraseBwd filled = *call;
    set_fill(filled.erasing, fill, count);
    launch_cam_erase_bwd(launcher, filled);
  });
}

int64_t emulate_cam_transform_mse_fwd(const Setting* setting, const CamTransformMseFwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) { launch_cam_transform_mse_fwd(launcher, *call); });
}

int64_t emulate_cam_transform_mse_bwd(const Setting* setting, const CamTransformMseBwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    CamTransformMseBwd with_scratch = *call;
    const auto size = static_cast<size_t>(cam_transform_mse_bwd_scratch(call->maps).total());
    std::vector<double> scratch(size / 8 + 1, NAN);  // aligned as torch aligns its tensors
    with_scratch.scratch = scratch.data();
    launch_cam_transform_mse_bwd(launcher, with_scratch);
  });
}

int64_t emulate_cam_seeds_fwd(const Setting* setting, const CamSeedsFwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    CamSeedsFwd planned = *call;
    const auto words = static_cast<size_t>(plan_cam_seeds_fwd(launcher.hardware(), planned));
    std::vector<int64_t> scratch(words, -1);
    planned.scratch = words == 0 ? nullptr : scratch.data();
    launch_cam_seeds_fwd(launcher, planned);
  });
}

int64_t emulate_cam_seeds_bwd(const Setting* setting, const CamSeedsBwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) { launch_cam_seeds_bwd(launcher, *call); });
}

int64_t emulate_stochastic_consistency_fwd(const Setting* setting, const StochasticConsistencyFwd* call) {
  return guarded(setting,
                 [&](EmulatorLauncher& launcher) { launch_stochastic_consistency_fwd(launcher, *call); });
}

int64_t emulate_stochastic_consistency_bwd(const Setting* setting, const StochasticConsistencyBwd* call) {
  return guarded(setting,
                 [&](EmulatorLauncher& launcher) { launch_stochastic_consistency_bwd(launcher, *call); });
}

int64_t emulate_otsu_mask_fwd(const Setting* setting, const OtsuMaskFwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) { launch_otsu_mask_fwd(launcher, *call); });
}

int64_t emulate_masked_max_pool_fwd(const Setting* setting, const MaskedMaxPoolFwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) { launch_masked_max_pool_fwd(launcher, *call); });
}

int64_t emulate_masked_max_pool_bwd(const Setting* setting, const MaskedMaxPoolBwd* call) {
  return guarded(setting, [&](EmulatorLauncher& launcher) { launch_masked_max_pool_bwd(launcher, *call); });
}

// from, to: [blocks * threads]
int64_t emulate_reverse(const Setting* setting, const float* from, float* to, int32_t mistake, bool fixed) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    const LaunchShape shape{setting->cluster, setting->threads, setting->cluster,
                            int64_t{4} * setting->threads};
    launcher.run(emulator::reverse_kernel, shape,
                 emulator::Reverse{from, to, static_cast<emulator::Mistake>(mistake), fixed});
  });
}

// values: [blocks * threads]; sums: [blocks]
int64_t emulate_block_sums(const Setting* setting, int64_t blocks, const int* values, int* sums,
                           int32_t mistake) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    launcher.run(emulator::block_sums_kernel, LaunchShape{blocks, setting->threads, setting->cluster, 0},
                 emulator::BlockSums{values, sums, static_cast<emulator::Mistake>(mistake)});
  });
}

// values: [blocks * threads]; counts: [bins]
int64_t emulate_histogram(const Setting* setting, int64_t blocks, const int* values, int* counts,
                          int32_t bins, int32_t mistake) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    launcher.run(emulator::histogram_kernel, LaunchShape{blocks, setting->threads, setting->cluster, 0},
                 emulator::Histogram{values, counts, bins, static_cast<emulator::Mistake>(mistake)});
  });
}

// values: [blocks * threads]
int64_t emulate_tally(const Setting* setting, int64_t blocks, const int* values, emulator::Tally* tally) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    launcher.run(emulator::tally_kernel, LaunchShape{blocks, setting->threads, setting->cluster, 0},
                 emulator::Tallying{values, tally});
  });
}

int64_t emulate_launch(const Setting* setting, int64_t blocks, int64_t shared) {
  return guarded(setting, [&](EmulatorLauncher& launcher) {
    launcher.run(emulator::empty_kernel, LaunchShape{blocks, setting->threads, setting->cluster, shared},
                 emulator::Nothing{});
  });
}

}  // extern "C"
