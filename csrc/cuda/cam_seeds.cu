// Torch binding of cam_seeds_fwd and cam_seeds_bwd.
#include "cam_binding.h"
#include "cam_seeds.cuh"

namespace camkernels::cuda {

void cam_seeds_fwd_cuda(const Tensor& features, const Tensor& weight, const Tensor& target,
                        const std::optional<Tensor>& seeds, const std::optional<Tensor>& noise,
                        int64_t /* num_seeds */, double threshold, double eps, const Tensor& vectors,
                        const Tensor& indices, const Tensor& count, const Tensor& cam, const Tensor& cam32,
                        const Tensor& extent) {
  const Tensor& seed_features = seeds ? *seeds : features;
  CamSeedsFwd call{};
  call.front = front_of(features, weight, target, eps, cam, cam32, extent);
  call.seed_features = seed_features.const_data_ptr();
  call.noise = noise ? static_cast<const float*>(noise->const_data_ptr()) : nullptr;
  call.vectors = vectors.mutable_data_ptr();
  call.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  call.count = static_cast<int64_t*>(count.mutable_data_ptr());
  call.num_seeds = dimension_of(vectors, 1);
  call.depth = dimension_of(seed_features, 1);
  call.threshold = static_cast<float>(threshold);
  call.seeds_dtype = dtype_of(seed_features);
  call.seeds_channels_last = is_channels_last(seed_features);
  CudaLauncher launcher(features);
  std::optional<Tensor> scratch;
  if (const int64_t words = plan_cam_seeds_fwd(launcher.hardware(), call); words > 0) {
    scratch = torch::stable::new_empty(features, {words}, torch::headeronly::ScalarType::Long);
    call.scratch = static_cast<int64_t*>(scratch->mutable_data_ptr());
  }
  launch_cam_seeds_fwd(launcher, call);
}

void cam_seeds_bwd_cuda(const Tensor& grad_vectors, const Tensor& indices, bool add,
                        const Tensor& grad_seed_features) {
  CamSeedsBwd call{};
  call.grad_vectors = grad_vectors.const_data_ptr();
  call.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  call.grad_seed_features = grad_seed_features.mutable_data_ptr();
  call.images = grad_seed_features.size(0);
  call.num_seeds = dimension_of(grad_vectors, 1);
  call.depth = dimension_of(grad_seed_features, 1);
  call.height = dimension_of(grad_seed_features, 2);
  call.width = dimension_of(grad_seed_features, 3);
  call.dtype = dtype_of(grad_seed_features);
  call.channels_last = is_channels_last(grad_seed_features);
  call.add = add;
  CudaLauncher launcher(grad_seed_features);
  launch_cam_seeds_bwd(launcher, call);
}

CAMKERNELS_CUDA_LIBRARY(m) {
  m.impl("cam_seeds_fwd", TORCH_BOX(&cam_seeds_fwd_cuda));
  m.impl("cam_seeds_bwd", TORCH_BOX(&cam_seeds_bwd_cuda));
}

}  // namespace camkernels::cuda
