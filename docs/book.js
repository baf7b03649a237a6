// A formula in the text that is wider than its line gets a box of its own that scrolls.
"use strict";

(() => {
  function box() {
    for (const formula of document.querySelectorAll("article span.math")) {
      const inside = formula.firstElementChild;
      const around = formula.closest("p, li, td, th, dd, article");
      if (!inside || !around.clientWidth) continue;
      formula.classList.toggle("wide", inside.offsetWidth > around.clientWidth);
    }
  }
  window.addEventListener("load", async () => {
    await globalThis.MathJax?.startup?.promise;
    box();
  });
  window.addEventListener("resize", box);
  document.addEventListener("toggle", box, true); // what is folded has no width before
})();
