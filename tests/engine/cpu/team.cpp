// Ranks of unequal speed take things round after round, without meeting in between: each thing once, in every round.
#include "machine/team.hpp"

#include <cstdio>

int main() {
    constexpr int kJobs = 200, kRounds = 20, kGroups = 3;
    int failures = 0, stolen = 0;
    for (int size = 1; size <= 4; size++) {
        Team team(4);
        for (int job = 0; job < kJobs; job++) {
            std::vector<std::atomic<int>> taken(kRounds * 40 * kGroups);
            std::atomic<int> others{0};
            team.run(job % 7 == 0 ? 1 : size, [&](Team::Member& by) {
                for (int round = 0; round < kRounds; round++) {
                    const long count = (job + round) % 40;  // now and then fewer than there are ranks, or none
                    const Range own = by.part(count * kGroups);
                    by.take(count, kGroups, [&](long index, long group) {
                        const long number = index * kGroups + group;
                        taken[round * 40 * kGroups + number]++;
                        others += number < own.first || number >= own.last;
                        for (volatile int spin = 0; spin < 400 * by.rank(); spin = spin + 1) {}
                    });
                }
            });
            for (int round = 0; round < kRounds; round++) {
                for (long number = 0; number < 40 * kGroups; number++) {
                    const bool is_there = number < (job + round) % 40 * kGroups;
                    failures += taken[round * 40 * kGroups + number] != int(is_there);
                }
            }
            stolen += others;
        }
    }
    std::printf("%d %d\n", failures, stolen);
}
