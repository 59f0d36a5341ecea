// Entry points of the CPU kernels, one group per op.
#pragma once

#include "params.h"

namespace stepcredit {

void masked_advantages_cpu(const MaskedAdvantagesParams<float>& p);
void masked_advantages_cpu(const MaskedAdvantagesParams<double>& p);

void information_gain_cpu(const InformationGainParams<float>& p);
void information_gain_cpu(const InformationGainParams<double>& p);

void topk_search_cpu(const TopkSearchParams& p);

}  // namespace stepcredit
