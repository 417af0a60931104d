"""Metrics of samples: FID and the other scores of Inception features, reference statistics, the digits demo's judge."""
