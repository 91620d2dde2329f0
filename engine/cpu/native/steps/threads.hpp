// A decoder's threads: a team of as many as the machine has cores to spare when a job begins (cores.hpp).
#pragma once

#include "machine/cores.hpp"
#include "products/linear.hpp"
#include "machine/team.hpp"

class Threads {
public:
    Threads(int max_threads, const Cores& cores) : team_(max_threads), cores_(cores) {}

    int max_size() const { return team_.max_size(); }

    // Of those that ran last.
    int size() const { return team_.size(); }

    // Calls job(member) once on each; returns when all have done it. Who needs the matrix unit finds it usable.
    template <class Job>
    void run(Job job) {
        team_.run(cores_.take(), [&](Team::Member& by) {
            [[maybe_unused]] const MatrixUnit unit;
            job(by);
        });
    }

    // The step is over: others may have the cores.
    void leave() { cores_.leave(); }

private:
    Team team_;
    Cores cores_;
};
