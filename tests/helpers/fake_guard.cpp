// Device guard of CUDA for a PyTorch without it: autograd and indexing ask for one, and fake tensors
// need nothing of it.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using FakeGuard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
}  // namespace
