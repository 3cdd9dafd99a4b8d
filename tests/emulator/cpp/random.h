// Where the seed of the emulator leads.
#pragma once

namespace emulator {

// A small generator is enough: the seed must only reach many orders.
class Random {
  public:
    explicit Random(unsigned long long seed) : state_(seed) {}
    unsigned long long next() {  // SplitMix64
        unsigned long long z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    unsigned below(unsigned n) { return next() % n; }

  private:
    unsigned long long state_;
};

}  // namespace emulator
