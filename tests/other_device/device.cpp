// A device that computes on the CPU but whose tensors are not the CPU's: what mixes the two fails, as it does on a GPU.
//
// Memory is the host's. An operation that is not below is run by the CPU's kernel on aliases of its tensors. See
// https://docs.pytorch.org/tutorials/advanced/privateuseone.html

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <set>

using namespace at;
using at::autocast::CastPolicy;

namespace {

constexpr auto kOther = DeviceType::PrivateUse1;
const DispatchKeySet kKeys(DispatchKey::PrivateUse1);

struct OtherAllocator final : Allocator {
  static void release(void* data) {
    if (data) c10::free_cpu(data);
  }
  DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &release, Device(kOther, 0)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} allocator;
REGISTER_ALLOCATOR(kOther, &allocator);

// ---------------------------------------------------------------- one device, one stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = kOther;
  Guard() = default;
  explicit Guard(DeviceType) {}
  static Stream stream() { return Stream(Stream::DEFAULT, Device(kOther, 0)); }
  DeviceType type() const override { return kOther; }
  Device exchangeDevice(Device) const override { return Device(kOther, 0); }
  Device getDevice() const override { return Device(kOther, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct OtherGenerator : CPUGeneratorImpl {
  OtherGenerator() {
    device_ = Device(kOther, 0);
    key_set_ = kKeys;
  }
};

Generator& default_generator() {
  static Generator generator = make_generator<OtherGenerator>();
  return generator;
}

struct Hooks : PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<OtherGenerator>(); }
  Device getDeviceFromPtr(void*) const override { return Device(kOther, 0); }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto* known = storage.unsafeGetStorageImpl();
    DataPtr fresh = allocator.allocate(bytes);
    if (const size_t kept = std::min(bytes, known->nbytes())) memcpy(fresh.get(), known->data(), kept);
    known->set_data_ptr_noswap(std::move(fresh));
    known->set_nbytes(bytes);
  }
} hooks;

// ---------------------------------------------------------------- tensors here and there

bool is_other(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kOther; }

Tensor view_of(Storage storage, const Tensor& like, DispatchKeySet keys) {
  Tensor out = at::detail::make_tensor<TensorImpl>(std::move(storage), keys, like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

// The CPU's view of the same memory.
Tensor on_host(const Tensor& tensor) {
  auto release = [](void* storage) { delete static_cast<Storage*>(storage); };
  const Storage& own = tensor.storage();
  DataPtr data(own.mutable_data(), new Storage(own), release, Device(kCPU));
  Storage storage(Storage::use_byte_size_t(), own.nbytes(), std::move(data), nullptr, false);
  Tensor out = view_of(std::move(storage), tensor, DispatchKeySet(DispatchKey::CPU));
  out._set_conj(tensor.is_conj());
  out._set_neg(tensor.is_neg());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  return out;
}

Tensor new_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, dtype.value_or(kFloat));
}

Tensor new_tensor(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, dtype.value_or(kFloat), format);
}

Tensor moved(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  Tensor out = new_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, {}, {});
  on_host(out).copy_(tensor);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  return out;
}

const Tensor& resized(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat> format) {
  const size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  if (needed > self.storage().nbytes()) hooks.resizePrivateUse1Bytes(self.storage(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor copied(const Tensor& self, const Tensor& to, bool) {
  (is_other(to) ? on_host(to) : to).copy_(is_other(self) ? on_host(self) : self);
  return to;
}

Tensor copied_and_resized(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copied(self, to, false);
}

Scalar number(const Tensor& self) { return at::_local_scalar_dense(on_host(self)); }

Tensor& set_part(Tensor& self, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* own = self.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(std::move(source));
  own->set_sizes_contiguous(size);
  if (stride.size() == size.size()) own->set_sizes_and_strides(size, stride);
  own->set_storage_offset(offset);
  return self;
}

Tensor& set_whole(Tensor& self, Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_part(self, std::move(source), 0, {count}, {});
}

Tensor& set_as(Tensor& self, const Tensor& source) {
  return set_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// ---------------------------------------------------------------- everything else

const std::set<std::string> kMayMix = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::_index_put_impl_"};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::string name = toString(op.operator_name());
  torch::jit::Stack given(stack->end() - arguments.size(), stack->end());
  stack->resize(stack->size() - arguments.size());
  std::vector<std::pair<Tensor, Tensor>> pairs;
  bool mixed = false;
  auto here = [&](const Tensor& tensor) {
    if (!is_other(tensor)) {
      mixed |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    }
    return pairs.emplace_back(tensor, on_host(tensor)).second;
  };
  for (auto& value : given) {
    if (value.isTensor()) {
      value = here(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(here(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional<Tensor>(here(*tensor)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kOther) {
      value = Device(kCPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().type() == kOther, name, ": the generator is not of this device");
    }
  }
  TORCH_CHECK(pairs.empty() || !mixed || kMayMix.count(name), name, ": tensors are on two devices");
  for (size_t at = 0; at < arguments.size(); ++at) {  // an empty output may become larger
    if (!arguments[at].is_out() || !given[at].isTensor() || given[at].toTensor().numel()) continue;
    const Tensor own = given[at].toTensor();
    given[at] = at::empty({0}, own.options());
    for (auto& [there, known] : pairs) {
      if (known.is_same(own)) known = given[at].toTensor();
    }
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &given);
  for (auto& [there, known] : pairs) {
    if (there.sizes() != known.sizes()) copied_and_resized(known, there);
  }
  auto back = [&](const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kCPU) return tensor;
    for (auto& [there, known] : pairs) {
      if (known.is_same(tensor)) return there;
    }
    for (auto& [there, known] : pairs) {
      const bool shares = tensor.storage().data() && tensor.storage().data() == there.storage().data();
      if (shares) return view_of(there.storage(), tensor, kKeys);
    }
    return pairs.empty() && mixed ? tensor : moved(tensor);
  };
  for (auto& value : given) {
    if (value.isTensor()) {
      stack->emplace_back(back(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(back(tensor));
      stack->emplace_back(list);
    } else {
      stack->push_back(value);
    }
  }
}

Tensor convolved(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups) {
  const bool has_bias = bias && bias->defined();
  TORCH_CHECK(is_other(x) && is_other(weight) && (!has_bias || is_other(*bias)), "conv: tensors are on two devices");
  const auto own = has_bias ? std::optional<Tensor>(on_host(*bias)) : std::nullopt;
  return moved(at::convolution(on_host(x), on_host(weight), own, stride, padding, dilation, transposed, more, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolved_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef more, int64_t groups,
                                                        std::array<bool, 3> mask) {
  const int64_t outputs = transposed ? weight.size(1) * groups : weight.size(0);
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(on_host(gradient), on_host(x), on_host(weight), IntArrayRef{outputs}, stride, padding,
                               dilation, transposed, more, groups, mask);
  return {moved(of_x), moved(of_weight), moved(of_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", new_tensor);
  m.impl("empty_strided", new_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resized);
  m.impl("_copy_from", copied);
  m.impl("_copy_from_and_resize", copied_and_resized);
  m.impl("_local_scalar_dense", number);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Tensor", set_as);
  m.impl("convolution_overrideable", convolved);
  m.impl("convolution_backward_overrideable", convolved_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(prelu, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register_hooks", [] { RegisterPrivateUse1HooksInterface(&hooks); });
  m.def("seed", [](uint64_t seed) { default_generator().set_current_seed(seed); });
}
