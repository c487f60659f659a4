// Settings of the emulated device, which tests change.
#pragma once

#include "emulated_block.h"

namespace fastattn::cuda::emulated {

struct DeviceOptions {
  Options block;  // its fault's barrier is a number within shared memory here
  int multiprocessors = 3;
  int keys = 0;  // of the tiles of the kernel that was launched last
};

DeviceOptions& device_options();

}  // namespace fastattn::cuda::emulated
