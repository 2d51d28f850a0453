// Work memory of a thread, and loops shared among threads. Included inside an instruction-set
// namespace.

inline int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }
inline int64_t ceil_div(int64_t x, int64_t m) { return (x + m - 1) / m; }

// A thread's arena: blocks that are added to while anyone uses them, and then become one.
struct Arena {
  struct Block {
    std::unique_ptr<char[]> bytes;
    size_t size;
  };
  std::vector<Block> blocks;
  size_t block = 0, used = 0, next_size = 0;

  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
};

// A piece of the arena with the lifetime of a scope. Scopes nest, also when the calling thread
// takes a share of its own parallel loop.
class Memory {
 public:
  Memory() : arena_(Arena::of_this_thread()), block_(arena_.block), used_(arena_.used) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    arena_.block = block_;
    arena_.used = used_;
    if (block_ > 0 || used_ > 0) return;
    // What a matrix of ordinary size needs is kept for the next call, more is given back. Of
    // several blocks each may be too small for what the next call takes first; one of their size is
    // not.
    size_t total = 0;
    for (const Arena::Block& b : arena_.blocks) total += b.size;
    if (total <= kKeep && arena_.blocks.size() <= 1) return;
    arena_.blocks.clear();
    arena_.next_size = total <= kKeep ? total : 0;
  }

  // Uninitialised, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = size_t(round_up(count * int64_t(sizeof(T)), 64));
    auto& [blocks, block, used, next_size] = arena_;
    while (block < blocks.size() && used + bytes > blocks[block].size) ++block, used = 0;
    if (block == blocks.size()) {
      const size_t size = std::max({bytes, size_t(1) << 20, next_size});
      next_size = 0;
      blocks.push_back({std::unique_ptr<char[]>(new char[size + 64]), size});
    }
    char* base = blocks[block].bytes.get();
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    T* p = reinterpret_cast<T*>(base + used);
    used += bytes;
    return p;
  }

 private:
  static constexpr size_t kKeep = size_t(16) << 20;
  Arena& arena_;
  size_t block_, used_;
};

// Runs a loop on this thread, or shares it among the pool's threads.
struct Executor {
  ParallelFor parallel;  // null: this thread
  int64_t threads = 1;   // in the pool
  template <class F>
  void run(int64_t count, int64_t grain, const F& f) const {
    if (!parallel) {
      if (count > 0) f(int64_t(0), count);
      return;
    }
    parallel(
        count, grain,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<const F*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};
