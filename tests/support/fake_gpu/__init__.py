"""What tests run on the CUDA device that computes nothing; see `cavmae.benchmarks.fake_cuda`."""
