// Forward KL and true labels with their gradient: see forward_kl.py for the formulas. A row's odds stay in the cache
// between what is asked of them, and the logits are read as their product left them.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "some.h"

namespace {

constexpr float TINY = 1e-30f;  // of the student's odds; what is below has lost digits

// What is asked of every row. Mirrored by the arguments of `maquette_forward_kl`.
struct Asked {
    const float* theirs;    // log p (rows, known), or where there are `ids` (rows, named + 1), the last of all others
    const int64_t* ids;     // (rows, named)
    const int64_t* labels;  // (rows) or null
    long size, known, named;
    float temperature, taught, told;
};

// odds[k] = e^(logits[k] / T - the highest); returns the highest, and adds to `total`.
template <typename T> float soften(const T* logits, long count, float temperature, float* odds, double& total) {
    Floats greatest = all(-INFINITY), sums = zeros();
    const Floats factor = all(1 / temperature);
    store(odds + (count - 1) / 16 * 16, greatest);
    each(count, [&](long k, Lanes mask) {
        store(odds + k, load(logits + k, mask) * factor, mask);
        greatest = larger(greatest, load(odds + k));
    });
    const float highest = largest(greatest);
    each(count, [&](long k, Lanes mask) {
        const Floats e = exponential(load(odds + k) - all(highest));
        store(odds + k, e);
        sums = sums + only(mask, e);
    });
    total += sum(sums);
    return highest;
}

// The loss of a row, and its gradient, where the teacher's odds are of all `known` tokens.
template <typename T>
double of_all(const Asked& asked, long row, const T* logits, float* odds, T* gradient) {
    double total = 0;
    const float* theirs = asked.theirs + row * asked.known;
    const float highest = soften(logits, asked.known, asked.temperature, odds, total);
    const float rest = highest + float(std::log(total));  // what divides odds, as a logarithm
    const Floats ours = all(float((asked.taught + asked.told) / total)), taught = all(asked.taught);
    const Floats factor = all(1 / asked.temperature), less = all(rest);
    Floats divergence = zeros();
    each(asked.known, [&](long k, Lanes mask) {
        const Floats said = load(theirs + k, mask), p = exponential(said);
        const Floats apart = said + less - load(logits + k, mask) * factor;
        divergence = divergence + only(mask, p * apart);
        store(gradient + k, fused_less(ours, load(odds + k, mask), taught * p), mask);
    });
    std::fill(gradient + asked.known, gradient + asked.size, T(0));
    double loss = double(asked.taught) * asked.temperature * sum(divergence);
    if (asked.labels) {
        const long label = asked.labels[row];
        const double q = odds[label] / total, p = std::exp(double(theirs[label]));
        gradient[label] = numbered<T>(float(asked.taught * (q - p) + asked.told * (q - 1)));
        loss += double(asked.told) * (rest - number(logits[label]) / asked.temperature);
    }
    return loss;
}

// The same where the teacher names some tokens, and the mass of all others.
template <typename T>
double of_some(const Asked& asked, long row, const T* logits, float* odds, T* gradient) {
    const long named = asked.named;
    const float* theirs = asked.theirs + row * (named + 1);
    const int64_t* ids = asked.ids + row * named;
    double whole = 0, tail = 0;
    const float highest = soften(logits, asked.size, asked.temperature, odds, whole);
    for (long j = 0; j < named; ++j) odds[ids[j]] = 0;
    const auto rest = [&] {
        Floats sums = zeros();
        each(asked.size, [&](long k, Lanes mask) { sums = sums + load(odds + k, mask); });
        return double(sum(sums));
    };
    tail = rest();
    double log_tail = std::log(tail);
    if (tail < TINY) {  // the student is all but sure that it is none of these: among themselves they still differ
        float most = -INFINITY;
        for (long j = 0; j < named; ++j) odds[ids[j]] = -1;
        for (long k = 0; k < asked.size; ++k)
            if (odds[k] >= 0) most = std::max(most, number(logits[k]) / asked.temperature);
        for (long k = 0; k < asked.size; ++k)
            odds[k] = odds[k] < 0 ? 0 : std::exp(number(logits[k]) / asked.temperature - most);
        tail = rest();
        log_tail = std::log(tail) + most - highest;
    }
    const double of_tail = std::exp(log_tail);
    double total = of_tail;
    const auto score = [&](long id) { return double(number(logits[id])) / asked.temperature - highest; };
    for (long j = 0; j < named; ++j) total += std::exp(score(ids[j]));
    const double log_total = std::log(total);
    double divergence = 0;
    const auto class_gradient = [&](double ours, double said) {  // log q and log p
        const double p = std::exp(said);
        divergence += p * (said - ours);
        return float((asked.taught + asked.told) * std::exp(ours) - asked.taught * p);
    };
    const float share = class_gradient(log_tail - log_total, theirs[named]) / float(tail);
    each(asked.size, [&](long k, Lanes mask) { store(gradient + k, load(odds + k, mask) * all(share), mask); });
    const long label = asked.labels ? asked.labels[row] : -1;
    float of_label = label < 0 ? 0 : odds[label] * share;
    for (long j = 0; j < named; ++j) {
        const float found = class_gradient(score(ids[j]) - log_total, theirs[j]);
        gradient[ids[j]] = numbered<T>(found);
        if (ids[j] == label) of_label = found;
    }
    double loss = double(asked.taught) * asked.temperature * divergence;
    if (asked.labels) {
        gradient[label] = numbered<T>(of_label - asked.told);
        loss += asked.told * (log_total - score(label));
    }
    return loss;
}

}  // namespace

extern "C" {

// The loss of each row (rows), and the gradient of its logits (rows, size), both of logits' type.
void maquette_forward_kl(Some logits, long rows, long size, const float* theirs, long known, const int64_t* ids,
                         long named, const int64_t* labels, float temperature, float taught, float told,
                         void* gradient, double* losses, int threads) {
    const Asked asked{theirs, ids, labels, size, known, named, temperature, taught, told};
    typed([=](auto* logits) {
        using T = std::remove_reference_t<decltype(*logits)>;
#pragma omp parallel num_threads(worth(rows * size, threads))
        {
            std::vector<float> odds(size_t(size + 16));
#pragma omp for schedule(static)
            for (long row = 0; row < rows; ++row) {
                const auto ask = ids ? of_some<T> : of_all<T>;
                losses[row] = ask(asked, row, logits + row * size, odds.data(), (T*)gradient + row * size);
            }
        }
    }, logits);
}
}
