// A functional emulator of PTX: the blocks of a grid one after the other, each with its warps interleaved.
//
// It says what a kernel computes and which of its accesses are wrong, not how long it takes. What it covers is what
// Mosaic GPU makes of our kernels; anything else is a fault. tests/ptx/README.md tells what is checked and what is not.

#include "block.h"

extern "C" {

// Name of an operation by its number, or null past the last.
const char* operation_name(int number) {
  return number >= 0 && number < OPERATION_COUNT ? kOperationNames[number] : nullptr;
}

// Runs a launch. Faults are written to `text` as lines (see Report::text), cut off at its size; returns the number of
// instructions of warps that ran.
uint64_t emulate(const Launch* launch, char* text, uint64_t text_bytes) {
  std::mt19937_64 random(launch->seed);
  Report report(*launch);
  GlobalMemory device(*launch, report);
  uint64_t steps = 0;
  try {
    const int32_t* grid = launch->grid;
    std::vector<int> blocks(grid[0] * grid[1] * grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (int block : blocks) {
      const int index[] = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
      steps += Block(*launch, report, device, random, index).run();
    }
  } catch (const Stop&) {
  }
  snprintf(text, text_bytes, "%s", report.text().c_str());
  return steps;
}

}  // extern "C"
