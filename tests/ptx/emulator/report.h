// Faults of the emulated program, counted by kind and line.

#pragma once

#include <map>
#include <string>
#include <tuple>

#include "program.h"

struct Stop {};  // thrown at a fault after which the program cannot go on

class Report {
 public:
  explicit Report(const Launch& launch) : launch_(launch) {}

  void fault(int pc, const std::string& kind, const std::string& detail = "") {
    const int line = pc >= 0 && pc < launch_.code_length ? launch_.code[pc].line : -1;
    auto [found, is_new] = faults_.try_emplace({kind, line}, 0, detail);
    found->second.first++;
  }

  [[noreturn]] void stop(int pc, const std::string& kind, const std::string& detail = "") {
    fault(pc, kind, detail);
    throw Stop();
  }

  // A line for each fault: kind, line of the PTX, how often, the first one's detail.
  std::string text() const {
    std::string all;
    for (const auto& [key, value] : faults_) {
      all += key.first + "\t" + std::to_string(key.second) + "\t" + std::to_string(value.first) + "\t" + value.second +
             "\n";
    }
    return all;
  }

 private:
  const Launch& launch_;
  std::map<std::pair<std::string, int>, std::pair<uint64_t, std::string>> faults_;
};

inline std::string operator""_s(const char* text, size_t length) { return std::string(text, length); }

template <class T>
std::string str(T number) {
  return std::to_string(number);
}
