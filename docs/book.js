// Formulas within the text, once MathJax has set them.
"use strict";

(() => {
  const formulas = () => document.querySelectorAll("article span.math");

  // No line begins with the comma after a formula: both are in one span, which does not wrap.
  function join() {
    for (const formula of formulas()) {
      const after = formula.nextSibling;
      const mark = after?.nodeType === Node.TEXT_NODE && after.data.match(/^[.,;:!?)]+/)?.[0];
      if (!mark) continue;
      formula.append(mark);
      after.deleteData(0, mark.length);
    }
  }

  // What is wider than its line gets a box of its own that scrolls.
  function box() {
    for (const formula of formulas()) {
      const inside = formula.firstElementChild;
      const around = formula.closest("p, li, td, th, dd, article");
      if (!inside || !around.clientWidth) continue;
      formula.classList.toggle("wide", inside.offsetWidth > around.clientWidth);
    }
  }

  window.addEventListener("load", async () => {
    await globalThis.MathJax?.startup?.promise;
    join();
    box();
  });
  window.addEventListener("resize", box);
  document.addEventListener("toggle", box, true); // what is folded has no width before
})();
